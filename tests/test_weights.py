import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autocompress.formats import weights

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
]


def round_trip(state: dict[str, Tensor], tmp_path: Path) -> dict[str, Tensor]:
    weights.save(state, tmp_path / "w.safetensors")
    return weights.load(tmp_path / "w.safetensors")


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(loaded: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert loaded[name].shape == tensor.shape, name
        assert bits(loaded[name]) == bits(tensor), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, density: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = torch.randint(1, 100, (60, 41)).to(dtype)
    kept = torch.rand(60, 41) < density
    state = {"w": torch.where(kept, dense, torch.zeros((), dtype=dtype))}
    assert_same(round_trip(state, tmp_path), state)


def test_special_values_keep_their_bits(tmp_path: Path) -> None:
    nan_with_payload = torch.tensor([0x7FC0_1234], dtype=torch.int32).view(torch.float32)
    special = torch.cat([nan_with_payload, torch.tensor([math.inf, -math.inf, 1e-45, -1e-45])])
    state = {
        "dense": torch.cat([special, torch.tensor([-0.0])]),
        "sparse": torch.cat([special, torch.zeros(5000)]),
    }
    assert len(weights.to_bytes(state)) < 2000  # the second one is stored sparse
    assert_same(round_trip(state, tmp_path), state)


def test_negative_zeros_are_zeros(tmp_path: Path) -> None:
    torch.manual_seed(0)
    mask = torch.rand(10_000) < 0.1
    multiplied = torch.randn(10_000) * mask
    assert int(multiplied.signbit().sum()) > 4000  # half of the pruned weights are -0.0
    assert len(weights.to_bytes({"w": multiplied})) < 1.15 * (4 * int(mask.sum()) + 10_000 / 8)
    assert torch.equal(round_trip({"w": multiplied}, tmp_path)["w"], multiplied)


def test_shapes_and_layouts(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    state = {
        "scalar": torch.tensor(3.5),
        "counter": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "transposed": base.permute(2, 0, 1),
        "strided": torch.arange(100)[::3],
        "expanded": torch.tensor([1.0, 0.0]).expand(500, 2),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(torch.randn(3)),
        "whole": base,
        "part": base[1],
        "flat": base.view(-1),
    }
    assert_same(round_trip(state, tmp_path), state)


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    embedding = nn.Embedding(100, 32)
    head = nn.Linear(32, 100, bias=False)
    head.weight = embedding.weight
    state = nn.ModuleDict({"in": embedding, "out": head}).state_dict()
    loaded = round_trip(state, tmp_path)
    assert_same(loaded, state)
    assert loaded["in.weight"] is loaded["out.weight"]
    assert (tmp_path / "w.safetensors").stat().st_size < 100 * 32 * 4 + 500


def test_equal_but_separate_tensors_stay_separate(tmp_path: Path) -> None:
    loaded = round_trip({"a": torch.ones(3), "b": torch.ones(3)}, tmp_path)
    assert loaded["a"].data_ptr() != loaded["b"].data_ptr()


@pytest.mark.parametrize("density", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pruned_model_is_as_small_as_its_nonzeros(density: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 128, 3), nn.Linear(512, 256)).to(dtype)
    state = model.state_dict()
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)  # of a weight's mask, in bits
    nonzero = mask_bits = 0
    for name, tensor in state.items():
        if tensor.dim() > 1:
            tensor.mul_(torch.rand(tensor.shape) < density)
            mask_bits += tensor.numel() * entropy
        nonzero += int((state[name] != 0).sum())
    headers = 200 * len(state)
    assert len(weights.to_bytes(state)) <= 1.15 * (nonzero * dtype.itemsize + mask_bits / 8) + headers


def test_the_mask_of_blocks_costs_next_to_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = (torch.rand(64, 128) < 0.05).repeat_interleave(4, 0).repeat_interleave(4, 1)
    state = {"w": torch.randn(256, 512) * blocks}
    nonzero = int(blocks.sum())
    assert 4 * nonzero < len(weights.to_bytes(state)) < 4 * nonzero + 256 * 512 / 8 / 10 + 200
    assert torch.equal(round_trip(state, tmp_path)["w"], state["w"])


def test_dense_weights_cost_their_bytes_and_a_header() -> None:
    state = nn.Linear(300, 300).state_dict()
    assert 0 <= len(weights.to_bytes(state)) - 4 * (300 * 300 + 300) < 300


def test_the_same_state_gives_the_same_bytes() -> None:
    state = {"b": torch.zeros(5000), "a": torch.randn(40), "c": torch.eye(100)}
    assert weights.to_bytes(state) == weights.to_bytes(dict(state))


def test_dense_tensors_are_readable_by_any_safetensors_reader(tmp_path: Path) -> None:
    state = {"a": torch.randn(4, 5), "b": torch.zeros(5000)}
    weights.save(state, tmp_path / "w.safetensors")
    assert torch.equal(load_file(tmp_path / "w.safetensors")["a"], state["a"])


def test_any_safetensors_file_is_readable(tmp_path: Path) -> None:
    state = {"a": torch.randn(4, 5), "a#mask": torch.ones(3)}
    save_file(state, tmp_path / "other.safetensors", metadata={"format": "pt"})
    assert_same(weights.load(tmp_path / "other.safetensors"), state)


def test_names_are_free(tmp_path: Path) -> None:
    state = {name: torch.zeros(5000) for name in ("w", "w#mask", "w#mask#mask", "ünïcode", "a.b.0", "")}
    assert_same(round_trip(state, tmp_path), state)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.one_of(st.just(0.0), st.floats(width=32)), max_size=400),
    padding=st.integers(0, 3000),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_any_values_come_back(values: list[float], padding: int, dtype: torch.dtype) -> None:
    tensor = torch.cat([torch.tensor(values, dtype=torch.float32), torch.zeros(padding)]).to(dtype)
    loaded = weights._from_bytes(weights.to_bytes({"w": tensor}))["w"]
    assert torch.equal(loaded.nan_to_num(nan=0.5), tensor.nan_to_num(nan=0.5))
    assert torch.equal(loaded.isnan(), tensor.isnan())


def test_the_state_is_not_changed_and_the_file_does_not_share_its_memory(tmp_path: Path) -> None:
    state = {"w": torch.randn(10), "z": torch.zeros(4000)}
    before = {name: t.clone() for name, t in state.items()}
    loaded = round_trip(state, tmp_path)
    assert_same(state, before)
    weights.save({"w": torch.zeros(10)}, tmp_path / "w.safetensors")
    loaded["z"].add_(1)
    assert_same({"w": loaded["w"]}, {"w": before["w"]})


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    weights.save({"w": torch.ones(3)}, path)
    with pytest.raises(Exception, match="meta"):
        weights.save({"w": torch.ones(3, device="meta")}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    assert_same(weights.load(path), {"w": torch.ones(3)})


def sparse_file(path: Path) -> bytes:
    weights.save({"w": torch.eye(100)}, path)
    return path.read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: b"",
        lambda good: good[:5],
        lambda good: good[:-7],
        lambda good: b"not a weights file at all, just text",
        lambda good: good.replace(b"[100, 100]", b"[100, 101]"),
        lambda good: good.replace(b"w#mask", b"w#musk"),
        lambda good: good[:-1] + bytes([good[-1] ^ 0xFF]),
        lambda good: good[:-200] + bytes([good[-200] ^ 1]) + good[-199:],
    ],
    ids=["empty", "stub", "cut", "text", "shape", "no mask", "mask bits", "one bit of a value"],
)
def test_a_corrupt_file_is_named_in_one_line(damage, tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    good = sparse_file(path)
    damaged = damage(good)
    assert damaged != good
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"broken\.safetensors") as caught:
        weights.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        weights.load(tmp_path / "none.safetensors")
