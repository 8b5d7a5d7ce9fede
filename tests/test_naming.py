"""Names for filters: the arithmetic, models on disk, and a network whose filters see colours."""

from __future__ import annotations

import json
import math
import re
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from colour_clip import COLOURS, LENGTH, make_tokenizer, paint, tower, write_colour_clip
from secateur.cli import app
from secateur.config import ScoreSection
from secateur.data import Batch
from secateur.data.batch_reader import BatchReader
from secateur.data.images import NormalisedImages, TensorImages
from secateur.data.preprocessing import Preprocessing
from secateur.data.vocabulary import read_vocabulary
from secateur.graph.build import build_dependency_graph
from secateur.integrations.image_text import load_image_text_model
from secateur.pipeline.name_filters import compare
from secateur.runtime.errors import DataError, SecateurError, UsageError, WeightsError
from secateur.scoring.naming import FIRST, LAST, TEMPERATURE, ImageWords, Naming, soft_wpmi
from secateur.scoring.scores import score_filters

WORDS = ("red", "green", "blue", "striped")
SEEN = ["red", "green", "blue", "striped", None, "red"]
"""What the filters of `ColourFilters` see; the fifth is never active."""


class ColourFilters(nn.Module):
    """Filters for three colours and for vertical stripes, one that is dead, and red once more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, len(SEEN), 3, padding=1)
        self.last = nn.Conv2d(len(SEEN), 2, 1)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.bias.zero_()  # type: ignore[union-attr]
            for filter_, channel in enumerate([0, 1, 2, None, None, 0]):
                if channel is not None:
                    self.conv.weight[filter_, :, 1, 1] = -0.5
                    self.conv.weight[filter_, channel, 1, 1] = 1.0
            self.conv.weight[3, :, 1, 0], self.conv.weight[3, :, 1, 1] = -1.0, 1.0
            self.conv.bias[4] = -100.0  # type: ignore[index]

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(F.relu(self.conv(images))).mean(dim=(2, 3))
        return logits


class ColoursAndStripes:
    """An image–text model that is known: distances from grey, and how much the columns differ."""

    def embed_images(self, images: Sequence[Tensor]) -> Tensor:
        rows = []
        for pixels in images:
            levels = pixels.float() / 127.5 - 1
            contrast = (levels[:, :, 1:] - levels[:, :, :-1]).abs().mean()[None]
            rows.append(torch.cat([levels.mean(dim=(1, 2)), 2 * contrast]))
        return F.normalize(torch.stack(rows), dim=1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        known = {word: (*COLOURS.get(word, (0, 0, 0)), float(word == "striped")) for word in texts}
        return F.normalize(torch.tensor([known[word] for word in texts]).float(), dim=1)


@pytest.fixture
def pixels(generator: torch.Generator) -> Tensor:
    """240 images of 8×10 pixels in six colours; every fourth has vertical stripes."""
    colours = list(COLOURS)
    images = paint([colours[number % 6] for number in range(240)], 10, generator)[:, :, 1:-1]
    images[::4, :, :, ::2] //= 3
    return images


def names_of(image_words: ImageWords, pixels: Tensor, batch_size: int) -> list[str | None]:
    """Return the names of the first layer's filters of `ColourFilters`."""
    network, images = ColourFilters().eval(), pixels.float() / 127.5 - 1
    dependencies = build_dependency_graph(network, images[:2])
    parts = [
        Batch(images[indices], torch.zeros(len(indices)).long(), indices)
        for indices in torch.arange(len(images)).split(batch_size)
    ]
    naming = Naming(image_words)
    score_filters(
        network, dependencies, lambda: iter(parts), {}, None, ScoreSection(), observers=(naming,)
    )
    naming.merge()
    names = naming.names(dependencies.groups["conv"])
    return [None if one is None else one.word for one in names]


def as_images(pixels: Tensor) -> TensorImages:
    return TensorImages(pixels, torch.zeros(len(pixels)).long())


READER = BatchReader(Preprocessing(8, 8), 64)


@pytest.mark.parametrize("batch_size", [240, 50])
def test_filters_are_named_by_what_they_see(pixels: Tensor, batch_size: int) -> None:
    image_words = compare(ColoursAndStripes(), WORDS, as_images(pixels), READER)
    assert image_words.top_count == 12
    assert names_of(image_words, pixels, batch_size) == SEEN


def test_a_layer_whose_other_filters_are_dead_has_no_names(pixels: Tensor) -> None:
    image_words = compare(ColoursAndStripes(), WORDS, as_images(pixels), READER)
    dark = torch.zeros_like(pixels)  # all filters respond to all images alike
    assert names_of(image_words, dark, 240) == [None] * len(SEEN)


def test_soft_wpmi_is_as_defined(generator: torch.Generator) -> None:
    similarities = torch.rand(9, 5, generator=generator)
    top = torch.stack([torch.randperm(9, generator=generator)[:4] for _ in range(3)])
    logarithms = torch.zeros(3, 5)
    for filter_ in range(3):
        for word in range(5):
            for place in range(4):
                image = similarities[int(top[filter_, place])] * TEMPERATURE
                probability = math.exp(image[word]) / sum(math.exp(one) for one in image)
                member = FIRST + (LAST - FIRST) * place / 4
                logarithms[filter_, word] += math.log(1 + member * (probability - 1)) / 4
    prior = logarithms.exp().mean(0).log()
    torch.testing.assert_close(soft_wpmi(similarities, top), logarithms - prior)


@pytest.fixture(scope="module")
def colour_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return write_colour_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every connection an error."""

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"connects to {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def unlike(generator: torch.Generator) -> list[Tensor]:
    """Three images of different sizes."""
    return [
        torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
        for size in ((20, 30), (33, 17), (24, 24))
    ]


def test_a_clip_on_disk_knows_the_colours(
    colour_clip: Path,
    generator: torch.Generator,
    offline: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from transformers.utils import logging

    capfd.readouterr()
    model = load_image_text_model(colour_clip)
    assert capfd.readouterr() == ("", "")  # no progress bar of transformers
    assert logging.is_progress_bar_enabled()
    words = list(COLOURS)
    images = model.embed_images(list(paint(words, 24, generator)))
    texts = model.embed_texts(words)
    assert (images @ texts.T).argmax(1).tolist() == list(range(len(words)))
    torch.testing.assert_close(images.norm(dim=1), torch.ones(len(words)))


def test_embeddings_are_those_of_transformers(
    tmp_path: Path, generator: torch.Generator, offline: None
) -> None:
    """SigLIP, whose texts are padded to one length."""
    transformers = pytest.importorskip("transformers")
    words = ["red", "green", "a red ball"]
    tokenizer = make_tokenizer(["red", "green", "a", "ball"])
    config = transformers.SiglipConfig(
        text_config=tower(vocab_size=8, max_position_embeddings=LENGTH, projection_size=6),
        vision_config=tower(image_size=8, patch_size=4),
    )
    model = transformers.SiglipModel(config).eval()
    processor = transformers.SiglipImageProcessor(size={"height": 8, "width": 8})
    for part in (model, tokenizer, processor):
        part.save_pretrained(tmp_path)
    images = unlike(generator)
    padded = tokenizer(words, padding="max_length", max_length=LENGTH, return_tensors="pt")
    pictures = [Image.fromarray(pixels.movedim(0, -1).numpy()) for pixels in images]
    with torch.no_grad():
        expected = model(**padded, **processor(images=pictures, return_tensors="pt"))
    loaded = load_image_text_model(tmp_path)
    torch.testing.assert_close(loaded.embed_images(images), expected.image_embeds)
    torch.testing.assert_close(loaded.embed_texts(words), expected.text_embeds)


def open_clip_config(**text: Any) -> dict[str, Any]:
    return {
        "model_cfg": {
            "embed_dim": 8,
            "vision_cfg": {
                "image_size": 16,
                "layers": 1,
                "width": 16,
                "head_width": 8,
                "patch_size": 8,
            },
            "text_cfg": {
                "context_length": 8,
                "vocab_size": 49408,
                "width": 16,
                "heads": 2,
                "layers": 1,
                **text,
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
    }


def test_embeddings_are_those_of_open_clip(
    tmp_path: Path, generator: torch.Generator, offline: None
) -> None:
    open_clip = pytest.importorskip("open_clip")
    config = open_clip_config()
    model = open_clip.CLIP(**config["model_cfg"]).eval()
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(dict(model.state_dict()), tmp_path / "open_clip_model.safetensors")
    words, images = ["red", "a green ball"], unlike(generator)
    transform = open_clip.image_transform(16, False, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    pictures = [Image.fromarray(pixels.movedim(0, -1).numpy()) for pixels in images]
    with torch.no_grad():
        expected = model(
            torch.stack([transform(picture) for picture in pictures]),
            open_clip.tokenize(words, context_length=8),
        )
    loaded = load_image_text_model(tmp_path)
    torch.testing.assert_close(loaded.embed_images(images), expected[0])
    torch.testing.assert_close(loaded.embed_texts(words), expected[1])


def without(name: str) -> Callable[[Path, Path], None]:
    def remove(model: Path, folder: Path) -> None:
        for path in model.iterdir():
            if path.name != name:
                (folder / path.name).write_bytes(path.read_bytes())

    return remove


def not_json(name: str) -> Callable[[Path, Path], None]:
    def write(model: Path, folder: Path) -> None:
        without(name)(model, folder)
        (folder / name).write_text("no JSON")

    return write


def fewer_tensors(model: Path, folder: Path) -> None:
    without("model.safetensors")(model, folder)
    save_file({"other": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})


def classifier(model: Path, folder: Path) -> None:
    without("config.json")(model, folder)
    config = {"model_type": "resnet", "architectures": ["ResNetForImageClassification"]}
    (folder / "config.json").write_text(json.dumps(config))


def of_open_clip(**text: Any) -> Callable[[Path, Path], None]:
    def write(model: Path, folder: Path) -> None:
        del model
        (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config(**text)))

    return write


BAD_MODELS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "no configuration": (without("config.json"), "holds neither config.json"),
    "bad configuration": (not_json("config.json"), "the configuration in .* can't be loaded"),
    "no weights": (without("model.safetensors"), "no model.safetensors in"),
    "other weights": (fewer_tensors, r"lack \d+ tensors of the model, such as"),
    "no tokenizer": (without("tokenizer.json"), "the tokenizer in .* can't be loaded"),
    "no preprocessing": (without("preprocessor_config.json"), "the image processor in"),
    "a classifier": (classifier, "does not embed both images and texts"),
    "parts elsewhere": (of_open_clip(hf_model_name="owner/text"), "elsewhere, owner/text"),
    "code": (of_open_clip(tokenizer_kwargs={"trust_remote_code": True}), "no code in a folder"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models_are_one_clear_error(
    case: str, colour_clip: Path, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, message = BAD_MODELS[case]
    make(colour_clip, tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as if all were installed
    with pytest.raises((UsageError, WeightsError), match=message) as caught:
        load_image_text_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named_with_its_extra(
    colour_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs transformers: pip install 'secateur\[naming\]'"):
        load_image_text_model(colour_clip)


def test_a_vocabulary_is_one_word_a_line(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeffred\r\n\na  green ball\nred\n".encode())
    assert read_vocabulary(path) == ("red", "a green ball")
    common = read_vocabulary(None, ["red", "a new class"])
    assert len(common) > 800
    assert common[-1] == "a new class"
    assert common.count("red") == 1
    for content, message in ((b"red\n\n", "holds 1 words"), (b"\xff\xfe\x00", "no text in UTF-8")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_vocabulary(path)


def test_images_must_be_pictures() -> None:
    images = NormalisedImages(torch.zeros(4, 3, 8, 8), torch.zeros(4).long())
    with pytest.raises(SecateurError, match="8-bit RGB images, and the data holds float32"):
        compare(ColoursAndStripes(), WORDS, images, READER)


NETWORK = """
import sys
sys.path.insert(0, {tests!r})
from test_naming import ColourFilters
"""


@pytest.fixture
def network_and_images(pixels: Tensor, tmp_path: Path) -> list[object]:
    """Arguments that name the network with colour filters and 240 images."""
    (tmp_path / "network.py").write_text(NETWORK.format(tests=str(Path(__file__).parent)))
    (tmp_path / "images").mkdir()
    for number, image in enumerate(pixels):
        picture = Image.fromarray(image.movedim(0, -1).contiguous().numpy())
        picture.save(tmp_path / "images" / f"{number:03}.png")
    (tmp_path / "words.txt").write_text("\n".join(list(COLOURS)))
    network = ["-m", f"{tmp_path}/network.py:ColourFilters", "--allow-untrained"]
    data = ["-d", f"images:{tmp_path / 'images'}", "--image-size", "8"]
    return [*network, *data, "--calibration-images", "240", "--criterion", "l1"]


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command line in this process; returns its exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
        code = 0
        try:
            app.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


def test_inspect_names_filters_with_a_clip_on_disk(
    network_and_images: list[object], colour_clip: Path, tmp_path: Path, command: Command
) -> None:
    naming = ["--naming-model", colour_clip, "--vocabulary", tmp_path / "words.txt"]
    common = ["inspect", *network_and_images, "--concepts", "colours", *naming]
    code, out, err = command(*common, "--json", "--pictures", tmp_path / "pictures")
    assert code == 0, err
    (group,) = json.loads(out)["groups"]
    names = group["names"]
    assert [one and one["word"] for one in names[:3]] == ["red", "green", "blue"]
    assert names[4] is None
    assert names[5] == names[0]
    page = (tmp_path / "pictures" / "index.html").read_text()
    rows = re.findall(r"<tr><td>(\d)</td>.*?<td>([\w–]+)</td><td>([\d.]*)</td></tr>", page)
    assert {int(number): word for number, word, _ in rows} == {
        number: "–" if one is None else one["word"] for number, one in enumerate(names)
    }
    code, out, err = command(*common, "--layer", "conv")
    assert code == 0, err
    assert out.splitlines()[0].split()[-2:] == ["name", "similarity"]
    assert out.splitlines()[1].split()[-2:] == ["red", f"{names[0]['similarity']:.3f}"]
    (tmp_path / "words.txt").write_text("red\n")
    code, out, err = command(*common)
    assert (code, out) == (1, "")
    assert "holds 1 words: at least two" in err
    code, out, err = command("inspect", *network_and_images, "--vocabulary", "words.txt")
    assert (code, out) == (2, "")
    assert "vocabulary (--vocabulary) needs naming_model (--naming-model)" in err


def test_the_report_of_a_run_names_filters(
    network_and_images: list[object], colour_clip: Path, tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "run"
    budget = ["-t", "filters=0.8", "--round-to", "1", "--no-finetune", "--set", "report.images=0"]
    code, _, err = command("prune", *network_and_images, *budget, "-o", run)
    assert code == 0, err
    naming = ["--naming-model", colour_clip, "--vocabulary", tmp_path / "words.txt"]
    code, _, err = command("report", run, *network_and_images[:2], "--images", 240, *naming)
    assert code == 0, err
    page = (run / "report.html").read_text()
    content = re.search(r'<script[^>]* id="data"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert content is not None
    (layer,) = json.loads(content[1])["layers"]
    assert [one and one[0] for one in layer["names"][:3]] == ["red", "green", "blue"]
    assert layer["names"][4] is None
    assert "A filter's name is the word" in page
