"""What every other package needs from the machine and from PyTorch.

- `errors`, `error_messages`: the exceptions, and one line for errors of the machine.
- `atomic_io`, `file_lock`, `event_log`, `trackers`: files that are whole or not there, one writer
  per folder, the log of a run, training curves.
- `safetensors_io`, `schema`, `hashing`, `input_limits`: reading files that strangers may have made.
- `distributed`, `signals`: the processes of one run, and requests to stop them.
- `memory`, `precision`, `timing`, `environment`, `seeding`: the machine and how it is used.
- `torch_internals`: what PyTorch doesn't document and other packages need.
- `progress`, `version`: small helpers.
"""
