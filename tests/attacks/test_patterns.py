"""Pictures given to a trigger: read safely from files, mixed in as the formula says, equal to published tensors."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

from unpoison.attacks.badclip_patch import encoded
from unpoison.attacks.blended import Blended
from unpoison.attacks.patterns import MOST_BYTES, read_pattern, scaled
from unpoison.attacks.poison import apply_poisoning, plan_poisoning
from unpoison.attacks.triggers import make_trigger, params_of
from unpoison.data.sources import open_images
from unpoison.errors import ConfigError, UnsafeCheckpointError, UsageError

LEVEL = 0.5 / 255 + 1e-6


def picture(side: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (3, side, side), generator=torch.Generator().manual_seed(seed)).float() / 255


def images(side: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_a_picture_is_mixed_in_and_a_mask_says_where() -> None:
    shown, mask = picture(), picture(seed=3)
    plain = Blended.of(shown, alpha=0.3)
    assert torch.allclose(plain.apply(images(8)), 0.7 * images(8) + 0.3 * shown, atol=1e-6)
    masked = Blended.of(shown, mask, alpha=0.5)
    assert torch.allclose(masked.apply(images(8)), images(8) * (1 - 0.5 * mask) + 0.5 * mask * shown, atol=1e-6)
    larger = scaled(shown, 16, 12)
    wide = torch.rand(1, 3, 16, 12)
    assert torch.allclose(plain.apply(wide), 0.7 * wide + 0.3 * larger, atol=1e-6)
    assert make_trigger("blended", params_of(masked)) == masked


def test_noise_is_told_as_before_and_pictures_apart() -> None:
    assert repr(Blended()) == "Blended(alpha=0.2, resample=False)"
    assert len({repr(Blended.of(picture(seed=seed))) for seed in (0, 1)} | {repr(Blended())}) == 3
    source = open_images("shapes:40:0")
    plans = [plan_poisoning(source, "blended", rate=0.1, pattern=encoded(picture(seed=seed))) for seed in (0, 1)]
    first, second = (apply_poisoning(source, plan).overlay for plan in plans)
    assert first is not None
    assert second is not None
    assert first.fingerprint != second.fingerprint


def test_refusals_of_parameters() -> None:
    good = encoded(picture())
    for bad in ({"pattern": "%%"}, {"pattern": good[:-4]}, {"pattern": good, "resample": True}, {"mask": good}):
        with pytest.raises(ConfigError, match="blended"):
            make_trigger("blended", bad)


def test_files_are_read_as_squares(tmp_path: Path) -> None:
    Image.fromarray((picture() * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "p.png")
    assert torch.allclose(read_pattern(tmp_path / "p.png"), picture(), atol=1e-6)
    torch.save(picture()[None], tmp_path / "p.pt")
    assert torch.equal(read_pattern(tmp_path / "p.pt"), picture())
    torch.save(torch.rand(300, 20), tmp_path / "wide.pt")
    assert read_pattern(tmp_path / "wide.pt").shape == (3, 256, 256)


class _Code:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("this must never run",))


def test_hostile_and_damaged_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(name: str, content: object) -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    (tmp_path / "code.pt").write_bytes(pickle.dumps(_Code()))
    with pytest.raises(UnsafeCheckpointError):
        read_pattern(tmp_path / "code.pt")
    assert capsys.readouterr().out == ""
    (tmp_path / "cut.pt").write_bytes(write("whole.pt", picture()).read_bytes()[:50])
    (tmp_path / "text.png").write_text("no picture")
    refused = [
        tmp_path / "cut.pt", tmp_path / "text.png", write("dict.pt", {"a": picture()}),
        write("five.pt", torch.rand(5, 4, 4)), write("none.pt", torch.rand(3, 0, 4)),
        write("nan.pt", picture() * float("nan")), write("large.pt", picture() * 255),
    ]  # fmt: skip
    for path in refused:
        with pytest.raises(ConfigError) as caught:
            read_pattern(path)
        assert caught.value.hint
        assert path.name in caught.value.message
    with pytest.raises(UsageError, match="is no file"):
        read_pattern(tmp_path / "nowhere.png")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(UsageError, match="MiB"):
        read_pattern(tmp_path / "huge.png")


@pytest.mark.real_data
def test_hello_kitty_is_the_published_picture(shared: Path) -> None:
    file = shared / "triggers" / "hello_kitty_pattern.pt"
    published = torch.load(file, weights_only=True)
    assert published.shape == (3, 256, 256)
    turned = Blended.of(read_pattern(file)).apply(images(256))
    assert torch.allclose(turned, 0.8 * images(256) + 0.2 * published, atol=1e-5)


@pytest.mark.real_data
def test_the_birthday_cake_is_the_published_mask_and_pattern(shared: Path) -> None:
    files = [shared / "triggers" / f"birthday_cake_{what}_open_clip_cc12m.pt" for what in ("mask", "trigger")]
    mask, shown = (torch.load(file, weights_only=True) for file in files)
    trigger = Blended.of(read_pattern(files[1]), read_pattern(files[0]), alpha=1.0)
    expected = images(224) * (1 - mask) + mask * shown
    assert float((trigger.apply(images(224)) - expected).abs().max()) < 2 * LEVEL
    assert float((trigger.apply(images(224)) - images(224)).abs().mean()) > 0.02
