"""Save one network with libraries for training, for `checkpoints.py`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint_makers import CLASSES, Saved, state_of, step, trained

IMAGES, LABELS = torch.rand(8, 3, 8, 8), torch.arange(8) % CLASSES


def _batches() -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, LABELS), 4)


def _image(number: int) -> Tensor:
    return IMAGES[number]


def _label(number: int) -> Tensor:
    return LABELS[number]


def from_lightning(folder: Path) -> Iterator[Saved]:
    """Checkpoints of `Trainer` and of Fabric."""
    import lightning
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
    from omegaconf import OmegaConf

    class Module(lightning.LightningModule):  # type: ignore[misc, unused-ignore]
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = trained()
            self.criterion = nn.CrossEntropyLoss(weight=torch.ones(CLASSES))

        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            loss: Tensor = self.criterion(self.model(batch[0]), batch[1])
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    plain = {"args": argparse.Namespace(lr=0.1), "width": 8}
    config = {"config": OmegaConf.create({"lr": 0.1, "layers": [1, 2]})}
    average = EMAWeightAveraging(decay=0.5)
    for name, how, options, weights_only, callbacks, said in (
        ("last", "ModelCheckpoint", {}, False, [], "criterion.weight"),
        ("weights", "ModelCheckpoint(save_weights_only=True)", {}, True, [], "criterion.weight"),
        ("namespace", "hyperparameters with a Namespace", plain, False, [], "criterion.weight"),
        ("omegaconf", "hyperparameters with OmegaConf", config, False, [], "criterion.weight"),
        ("average", "EMAWeightAveraging", {}, False, [average], "was loaded"),
    ):
        module = Module(**options)
        saver = ModelCheckpoint(folder, filename=name, save_weights_only=weights_only)
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            callbacks=[saver, *callbacks],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, _batches())
        path = folder / f"{name}.ckpt"
        if callbacks:
            stored = torch.load(path, weights_only=False)["state_dict"]
            prefix = "model."
            tensors = {k.removeprefix(prefix): t for k, t in stored.items() if k.startswith(prefix)}
        else:
            tensors = state_of(module.model)
        yield Saved("Lightning", how, path, tensors, said=said)
    fabric = lightning.Fabric(accelerator="cpu")
    model = trained()
    network, optimizer = fabric.setup(model, step(model))
    fabric.save(folder / "fabric.ckpt", {"model": network, "optimizer": optimizer, "iteration": 3})
    yield Saved("Lightning", "Fabric.save", folder / "fabric.ckpt", state_of(model))


def from_accelerate(folder: Path) -> Iterator[Saved]:
    """Folders of `save_state` and `save_model`."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = trained()
    prepared, *_ = accelerator.prepare(model, step(model), _batches())
    tensors = state_of(model)
    for safe in (True, False):
        kind = "safetensors" if safe else "bin"
        state, shards = folder / f"state-{kind}", folder / f"shards-{kind}"
        accelerator.save_state(str(state), safe_serialization=safe)
        yield Saved("accelerate", f"save_state, {kind}, the folder", state, tensors)
        accelerator.save_model(prepared, str(shards), max_shard_size="2KB", safe_serialization=safe)
        yield Saved("accelerate", f"save_model in shards, {kind}, the folder", shards, tensors)
        [index] = shards.glob("*.index.json")
        yield Saved("accelerate", f"save_model in shards, {kind}, the index", index, tensors)
    shard = sorted((folder / "shards-safetensors").glob("*-of-*"))[0]
    yield Saved("accelerate", "one shard of several", shard, refused="name their folder")
    shard.unlink()
    missing = "missing: copy all files"
    yield Saved("accelerate", "a shard is missing", shard.parent, refused=missing)
    yield Saved(
        "accelerate", "optimizer.bin alone", folder / "state-bin" / "optimizer.bin", refused="fit"
    )


def from_transformers(folder: Path) -> Iterator[Saved]:
    """Folders of `save_pretrained` and of `Trainer`."""
    import transformers

    model = trained(name="resnet")
    tensors = state_of(model)
    save: Any = model.save_pretrained
    for name, how, options in (
        ("whole", "save_pretrained", {}),
        ("shards", "save_pretrained in shards", {"max_shard_size": "5KB"}),
    ):
        save(str(folder / name), **options)
        yield Saved("transformers", f"{how}, the folder", folder / name, tensors, model="resnet")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    path = folder / "pytorch_model.bin"
    yield Saved("transformers", "pytorch_model.bin", path, tensors, model="resnet")
    rows = [{"pixel_values": IMAGES[n], "labels": LABELS[n]} for n in range(8)]
    arguments = transformers.TrainingArguments(
        str(folder / "trainer"), max_steps=1, save_steps=1, use_cpu=True, report_to="none"
    )
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    path = folder / "trainer" / "checkpoint-1"
    yield Saved("transformers", "Trainer, the folder", path, state_of(model), model="resnet")
    path = path / "training_args.bin"
    yield Saved("transformers", "training_args.bin alone", path, refused="TrainingArguments")


def from_fastai(folder: Path) -> Iterator[Saved]:
    """`Learner.save` and `Learner.export`."""
    from fastai.data.core import Datasets
    from fastai.learner import Learner

    model = trained()
    loaders = Datasets(list(range(8)), [[_image], [_label]]).dataloaders(bs=4, val_bs=4)
    learner = Learner(loaders, model, nn.CrossEntropyLoss(), path=folder)
    with learner.no_logging():
        learner.fit(1)
    path = learner.save("with-optimiser")
    yield Saved("fastai", "Learner.save", path, state_of(model))
    path = learner.save("model-alone", with_opt=False)
    yield Saved("fastai", "Learner.save(with_opt=False)", path, state_of(model))
    learner.export("export.pkl")
    yield Saved("fastai", "Learner.export", folder / "export.pkl", refused="fastai.learner.Learner")


def from_averages(folder: Path) -> Iterator[Saved]:
    """ema-pytorch keeps both networks in one state dict; torch-ema keeps a list."""
    from ema_pytorch import EMA
    from torch_ema import ExponentialMovingAverage

    model = trained()
    for online in (True, False):
        ema = EMA(model, beta=0.9, update_every=1, include_online_model=online)
        step(model)
        ema.update()
        path = folder / f"ema-{online}.pt"
        torch.save(ema.state_dict(), path)
        how = "EMA.state_dict()" if online else "EMA.state_dict(), without the online model"
        said = "'ema_model'"
        yield Saved("ema-pytorch", how, path, state_of(ema.ema_model), said=said)
        if online:
            how = "EMA.state_dict(), weights_key=online_model"
            yield Saved("ema-pytorch", how, path, state_of(model), key="online_model")
    average = ExponentialMovingAverage(model.parameters(), decay=0.9)
    content = {"model": model.state_dict(), "ema": average.state_dict()}
    torch.save(content, folder / "torch-ema.pt")
    yield Saved("torch-ema", "beside the network", folder / "torch-ema.pt", state_of(model))


def from_others(folder: Path) -> Iterator[Saved]:
    """safetensors, thop's counters and OmegaConf beside a state dict."""
    from omegaconf import OmegaConf
    from safetensors.torch import save_file, save_model
    from thop import profile

    model = trained()
    tensors = state_of(model)
    for name, how in (
        ("model.safetensors", "save_file"),
        ("model.ckpt", "save_file, another suffix"),
    ):
        save_file(model.state_dict(), folder / name)
        yield Saved("safetensors", how, folder / name, tensors)
    save_model(nn.DataParallel(model), str(folder / "saved-model"))
    yield Saved("safetensors", "save_model of a DataParallel", folder / "saved-model", tensors)
    config = OmegaConf.create({"lr": 0.1, "sizes": [8, 16], "name": None})
    torch.save({"cfg": config, "net": model.state_dict()}, folder / "config.pth")
    yield Saved("OmegaConf", "beside the state dict", folder / "config.pth", tensors)
    profiled = trained()
    profile(profiled, (torch.rand(1, 3, 8, 8),), verbose=False)
    torch.save(profiled.state_dict(), folder / "profiled.pth")
    kept = {name: tensor for name, tensor in profiled.state_dict().items() if name in tensors}
    yield Saved("thop", "state_dict() of a profiled network", folder / "profiled.pth", kept)
