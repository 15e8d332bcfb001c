"""InfoNCE against its equation; gradient caching against the whole batch; BatchNorm and random states left alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from unpoison.contrastive import (
    average_gradients,
    cached_gradients,
    gather_with_gradient,
    info_nce,
    optimiser_step,
    train_mode,
    without_graph,
)

SIZE = 10


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def unit(rows: int, seed: int, width: int = 5) -> Tensor:
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(drawn, dim=1)


def naive_info_nce(first: np.ndarray, second: np.ndarray, scale: float) -> float:
    total = 0.0
    for i in range(len(first)):
        forth = np.array([scale * first[i] @ second[j] for j in range(len(second))])
        back = np.array([scale * second[i] @ first[j] for j in range(len(first))])
        total += -forth[i] + np.log(np.exp(forth).sum()) - back[i] + np.log(np.exp(back).sum())
    return total / (2 * len(first))


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_info_nce_is_its_equation(scale: float) -> None:
    first, second = unit(7, 0), unit(7, 1)
    assert float(info_nce(first, second, scale)) == pytest.approx(naive_info_nce(first.numpy(), second.numpy(), scale))


class Towers(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.images = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4))
        self.texts = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4))
        self.log_scale = nn.Parameter(torch.tensor(1.3))


def towers(dropout: float = 0.0) -> Towers:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Towers(dropout).double().train()


IMAGES = torch.randn(SIZE, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
TEXTS = torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def embed_with(net: Towers, start: int, stop: int) -> list[Tensor]:
    return [F.normalize(net.images(IMAGES[start:stop]), dim=1), F.normalize(net.texts(TEXTS[start:stop]), dim=1)]


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad for name, value in net.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("chunk", [1, 3, 5, SIZE, 4 * SIZE])
def test_gradient_caching_is_exact(chunk: int, accelerator: Accelerator) -> None:
    net = towers()
    expected = copy.deepcopy(net)
    images, texts = embed_with(expected, 0, SIZE)
    value = info_nce(images, texts, expected.log_scale.exp())
    value.backward()
    calls = []

    def embed(start: int, stop: int) -> list[Tensor]:
        calls.append((start, stop))
        return embed_with(net, start, stop)

    found = cached_gradients(
        embed,
        lambda a, b: info_nce(a, b, net.log_scale.exp()),
        size=SIZE,
        chunk=chunk,
        module=net,
        accelerator=accelerator,
    )
    assert not found.requires_grad
    torch.testing.assert_close(found, value.detach())
    torch.testing.assert_close(gradients(net), gradients(expected))
    assert "log_scale" in gradients(net)
    assert max(stop - start for start, stop in calls) <= chunk
    assert all(value.requires_grad for value in net.parameters())


def test_a_frozen_tower_takes_no_gradient(accelerator: Accelerator) -> None:
    net = towers()
    net.texts.requires_grad_(False)

    def embed(start: int, stop: int) -> list[Tensor]:
        return embed_with(net, start, stop)

    cached_gradients(embed, lambda a, b: info_nce(a, b, 5.0), size=SIZE, chunk=4, module=net, accelerator=accelerator)
    assert set(gradients(net)) == {name for name, _ in net.named_parameters() if name.startswith("images")}
    assert not any(value.requires_grad for value in net.texts.parameters())


def test_dropout_is_the_same_in_both_passes_and_moves_on(accelerator: Accelerator) -> None:
    net = towers(dropout=0.5)
    seen: dict[int, list[Tensor]] = {}

    def embed(start: int, stop: int) -> list[Tensor]:
        parts = embed_with(net, start, stop)
        seen.setdefault(start, []).append(parts[0].detach())
        return parts

    def once() -> None:
        cached_gradients(
            embed, lambda a, b: info_nce(a, b, 5.0), size=SIZE, chunk=4, module=net, accelerator=accelerator
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        once()
        found = gradients(net)
        after = torch.get_rng_state()
        for first, second in seen.values():
            assert torch.equal(first, second)
        assert sorted(seen) == [0, 4, 8]
        # what plain autograd makes of the same masks
        torch.manual_seed(1)
        expected = towers(dropout=0.5)
        parts = [embed_with(expected, start, min(start + 4, SIZE)) for start in (0, 4, 8)]
        images, texts = (torch.cat(kind) for kind in zip(*parts, strict=True))
        info_nce(images, texts, 5.0).backward()
        torch.testing.assert_close(found, gradients(expected))
        assert torch.equal(torch.get_rng_state(), after)
        once()
        assert not torch.equal(seen[0][0], seen[0][2])


def test_one_process_needs_no_messages(accelerator: Accelerator) -> None:
    embeddings = unit(4, 0).requires_grad_()
    assert gather_with_gradient(embeddings, accelerator) is embeddings
    net = towers()
    images, texts = embed_with(net, 0, SIZE)
    info_nce(images, texts, 5.0).backward()
    before = {name: value.clone() for name, value in gradients(net).items()}
    average_gradients(net.parameters(), accelerator)
    torch.testing.assert_close(gradients(net), before)


def test_without_graph_keeps_gradient_mode_and_what_was_frozen() -> None:
    net = towers()
    net.texts.requires_grad_(False)
    with torch.no_grad(), without_graph(net):
        assert torch.is_grad_enabled()
        assert not any(part.requires_grad for part in embed_with(net, 0, 2))
    assert {name.split(".")[0] for name, value in net.named_parameters() if value.requires_grad} == {
        "images",
        "log_scale",
    }


def test_batch_norm_keeps_its_statistics() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3))).eval()
    train_mode(net)
    assert net.get_submodule("2.0").training
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(dict(net.state_dict()), before)


def test_a_plain_step(accelerator: Accelerator) -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    optimiser = torch.optim.SGD([weight], 0.5)
    (3 * weight).sum().backward()
    assert optimiser_step(optimiser, accelerator)
    assert weight.item() == pytest.approx(0.5)
