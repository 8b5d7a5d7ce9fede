"""The method, from a network and images to a pruned network.

- `prune`: the rounds and their stages; read this first.
- `stages`: one function per stage: cut, refit, distill, fine-tune.
- `rounds`, `pruned`: what a round starts from, and what it returns.
- `scoring_context`: what scoring, planning and refit share, made once per round.
- `inputs`, `input_fit`: the network and the data that a configuration names, and whether they fit.
- `run_context`: progress, log and unreadable images of a run.
- `estimate`: how long the stages will take.
- `dissect`: what the filters see, for reports.
- `verdict`: the outcome of a run in one sentence.
- `result`: the record of a run, as it is saved.
"""
