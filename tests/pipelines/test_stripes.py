"""Pictures in stripes of rows: the numbers of whole pictures, in less memory, with every row computed once."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from autoencoders import AUTOENCODERS, build_pair, decoded, encoded
from families import normal, relative_error
from live_bytes import peak_bytes

import vramkit
from vramkit.errors import ConfigError
from vramkit.pipelines.networks.stripes import Rows, Stripe, stripe_edges

STRIPED = ["Wan2.1", "LTX-Video 0.9.0", "LTX-Video 0.9.1", "LTX-Video 0.9.5"]
# Latent frames, rows and columns, of which several stripes are made, and rows of pixels that are no whole latent row.
SIZES = {"Wan2.1": (2, 12, 2, 5)} | dict.fromkeys(STRIPED[1:], (2, 3, 1, 0))

_pairs: dict[str, Any] = {}


def build(name: str) -> tuple[Any, Any]:
    return build_pair(name, **{"num_res_blocks": 1} if name == "Wan2.1" else {})


@pytest.fixture(params=STRIPED)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def ours(name: str) -> Any:
    """Built once and in doubles, where another order of adding shows in the last digits and anything else in the first."""
    if name not in _pairs:
        _pairs[name] = build(name)[0].double()
    yield _pairs[name]
    _pairs[name].disable_striping()


def clips(name: str, *, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """A clip of pixels and one of latents."""
    frames, height, width, rest = SIZES[name]
    ratio, rate = (8, 4) if name == "Wan2.1" else (32, 8)
    pixels = 1 + rate * (frames - 1), height * ratio + rest, width * ratio
    return normal(batch, 3, *pixels).double(), normal(batch, 4, frames, height, width).double()


def both(vae: Any, x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return encoded(vae, x), decoded(vae, z)


def assert_same(results: Any, expected: Any) -> None:
    for result, whole in zip(results, expected, strict=True):
        assert (result - whole).abs().amax() <= 1e-11 * whole.abs().amax()


@pytest.mark.parametrize("stripes", [2, 50])
def test_stripes_give_the_numbers_of_whole_pictures(name: str, ours: Any, stripes: int) -> None:
    x, z = clips(name)
    expected = both(ours, x, z)
    ours.enable_striping(stripes)
    assert_same(both(ours, x, z), expected)
    ours.enable_striping(1)
    assert all(torch.equal(a, b) for a, b in zip(both(ours, x, z), expected, strict=True))


def test_stripes_in_single_precision_have_no_seams(name: str) -> None:
    """What differs from the whole picture is rounding, as large at the edges of stripes as within them."""
    vae, oracle = build(name)
    x, z = (each.float() for each in clips(name))
    whole, expected = both(vae, x, z), both(oracle, x, z)
    vae.enable_striping(3)
    striped = both(vae, x, z)
    for a, b, c in zip(striped, whole, expected, strict=True):
        assert relative_error(a, c) <= 1e-5
        errors = (a - b).abs().amax(dim=(0, 1, 2, 4))  # by row
        assert errors.amax() <= 1e-4 * b.abs().amax()


@pytest.mark.parametrize("name", [name for name in STRIPED if name != "LTX-Video 0.9.1"])  # it draws noise for a slice
def test_slices_of_a_batch(name: str, ours: Any) -> None:
    x, z = clips(name, batch=2)
    expected = both(ours, x, z)
    ours.enable_striping(2)
    assert_same(both(ours, x, z), expected)
    ours.enable_slicing()
    assert_same(both(ours, x, z), expected)
    ours.disable_slicing()


class Lone:
    """So many ranks of which this one computes the parts of all, and notes how many rows its convolutions gave."""

    def __init__(self, size: int) -> None:
        self.size = size

    def computed(self, shapes: Any, makes: Any, like: torch.Tensor) -> Any:
        for shape, make in zip(shapes, makes, strict=True):
            part = make()
            assert part.shape == shape
            assert part.device == like.device
            yield part


@pytest.mark.parametrize("stripes", [None, 1, 5, 50])
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", [name for name in STRIPED if name != "LTX-Video 0.9.1"])  # it draws noise
def test_parts_of_the_rows_give_the_numbers_of_whole_pictures(name: str, ours: Any, ranks: int, stripes: int) -> None:
    ratio = 8 if name == "Wan2.1" else 32
    z = normal(1, 4, 2, 24 if ratio == 8 else 5, 2).double()
    expected = decoded(ours, z)
    if stripes is not None:
        ours.enable_striping(stripes)
    ours.tile_ranks = Lone(ranks)
    try:
        assert_same([decoded(ours, z)], [expected])
        assert_same([decoded(ours, z[..., :1, :])], [decoded_alone(ours, z[..., :1, :])])
        ours.enable_striping(stripes, output_device="cpu")
        assert_same([decoded(ours, z)], [expected])
    finally:
        ours.tile_ranks = None


def decoded_alone(vae: Any, z: torch.Tensor) -> torch.Tensor:
    ranks, vae.tile_ranks = vae.tile_ranks, None
    try:
        return decoded(vae, z)
    finally:
        vae.tile_ranks = ranks


@torch.no_grad()
def test_a_part_is_computed_with_few_rows_more() -> None:
    """Of the published decoder, the multiplications of half the rows of a picture of 60 rows of latents."""
    with torch.device("meta"):
        vae = vramkit.AutoencoderKLWan.from_config({}).bfloat16().eval()
        z = torch.empty(1, 16, 2, 60, 104).bfloat16()
        clip = torch.empty(1, 3, 5, 480, 832).bfloat16()

    def work(call: Any) -> float:
        done = [0.0]

        def note(module: Any, _: Any, y: torch.Tensor) -> None:
            done[0] += y.numel() * module.weight.numel() / y.shape[1]

        hooks = [
            m.register_forward_hook(note) for m in vae.modules() if isinstance(m, torch.nn.Conv3d | torch.nn.Conv2d)
        ]
        call()
        for hook in hooks:
            hook.remove()
        return done[0]

    whole = work(lambda: vae.decode(z))
    halves = [work(lambda part=part: vae._decode_rows(z, clip, part, 2)) for part in (slice(0, 30), slice(30, 60))]
    assert max(halves) <= 0.56 * whole, [half / whole for half in halves]
    assert min(halves) > 0.5 * whole


@pytest.mark.parametrize("rows", [1, 2])
def test_pictures_of_few_rows_are_computed_in_fewer_stripes(name: str, ours: Any, rows: int) -> None:
    z = normal(1, 4, 2, rows, 2).double()
    expected = decoded(ours, z)
    ours.enable_striping(4)
    assert_same([decoded(ours, z)], [expected])


def test_a_clip_put_together_on_another_device(name: str, ours: Any) -> None:
    _, z = clips(name)
    expected = decoded(ours, z)
    ours.enable_striping(2, output_device="cpu")
    assert_same([decoded(ours, z)], [expected])
    ours.enable_striping(2, output_device="meta")
    assert decoded(ours, z).device.type == "meta"
    ours.disable_striping()
    assert decoded(ours, z[..., :1, :]).device.type == "cpu"


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@pytest.mark.parametrize("name", ["Wan2.1", "LTX-Video 0.9.0"])
def test_streamed_weights_give_the_same_bytes(name: str, offload_type: str) -> None:
    vae, _ = build(name)
    x, z = (each.float() for each in clips(name))
    vae.enable_striping(2)
    expected = both(vae, x, z)
    offload = vae.enable_group_offload("cpu", offload_type=offload_type)
    assert all(torch.equal(a, b) for a, b in zip(both(vae, x, z), expected, strict=True))
    offload.remove()


def test_every_row_is_computed_once(name: str, ours: Any) -> None:
    """Rows that convolutions give, by module: as many in stripes as in whole pictures."""

    def rows_given(call: Any) -> Counter[str]:
        given: Counter[str] = Counter()
        hooks = [
            module.register_forward_hook(
                lambda module, args, y, key=key: given.update({key: y.shape[0] * y.shape[2] * y.shape[-2]})
            )
            for key, module in ours.named_modules()
            if isinstance(module, torch.nn.Conv3d)
        ]
        call()
        for hook in hooks:
            hook.remove()
        return given

    x, z = clips(name)
    whole = rows_given(partial(both, ours, x, z))
    ours.enable_striping(3)
    striped = rows_given(partial(both, ours, x, z))
    again = {key: striped[key] - whole[key] for key in whole if striped[key] != whole[key]}
    # The row above an enlargement, and one that a folding convolution gives beyond its pairs.
    assert all("time_conv" in key or "shortcut" in key for key in again), again


@pytest.mark.parametrize(
    ("name", "shape", "limits"),
    [("Wan2.1", (1, 16, 2, 24, 16), (0.75, 0.65)), ("LTX-Video 0.9.0", (1, 128, 6, 16, 24), (0.9, 0.8))],
)
def test_stripes_need_less_memory(name: str, shape: tuple[int, ...], limits: tuple[float, float]) -> None:
    peaks = []
    with torch.device("meta"):
        vae, z = (
            getattr(vramkit, AUTOENCODERS[name].kind).from_config({}).bfloat16().eval(),
            torch.empty(shape).bfloat16(),
        )
    for stripes in (1, 4, 8):
        vae.enable_striping(stripes)
        peaks.append(peak_bytes(lambda: vae.decode(z), [z, *vae.parameters()], fused=True))
    assert peaks[1] <= limits[0] * peaks[0]
    assert peaks[2] <= limits[1] * peaks[0], peaks


def test_the_size_of_pictures_decides_how_many_stripes_there_are() -> None:
    with torch.device("meta"):
        vae = vramkit.AutoencoderKLWan.from_config(AUTOENCODERS["Wan2.1"].tiny)
        sizes = [torch.empty(1, 3, 1, *size, dtype=torch.bfloat16) for size in ((256, 256), (480, 832), (720, 1280))]
    assert [vae._stripe_count(each) for each in sizes] == [1, 1, 1]
    vae.enable_striping()
    assert [vae._stripe_count(each) for each in sizes] == [1, 7, 15]
    assert [vae._stripe_count(each.float()) for each in sizes] == [2, 13, 29]


@pytest.mark.parametrize("stripes", [0, -1, 1.5, True, "2"])
def test_numbers_that_are_none_are_refused(stripes: Any) -> None:
    vae, _ = build_pair("Wan2.1")
    with pytest.raises(ConfigError, match="stripes is"):
        vae.enable_striping(stripes)
    assert not vae.use_striping


@pytest.mark.parametrize("name", ["Wan2.1", "LTX-Video 0.9.0"])
def test_tiles_and_stripes_exclude_each_other(name: str) -> None:
    vae, _ = build_pair(name)
    vae.enable_striping(2)
    with pytest.raises(ConfigError, match="disable_striping"):
        vae.enable_tiling()
    vae.use_tiling = True
    with pytest.raises(ConfigError, match="disable_striping"):
        vae.decode(normal(1, 4, 1, 2, 2))
    vae.disable_striping()
    with pytest.raises(ConfigError, match="disable_tiling"):
        vae.enable_striping(2)
    assert not vae.use_striping


@pytest.mark.parametrize("name", ["HunyuanVideo", "CogVideoX"])
def test_norms_over_whole_clips_are_not_cut(name: str) -> None:
    vae, _ = build_pair(name)
    with pytest.raises(ConfigError, match=r"norms.*enable_tiling"):
        vae.enable_striping(2)


def test_edges_give_equally_many_rows() -> None:
    assert stripe_edges(60, 6, lag=7) == [0, 17, 27, 37, 47, 57, 60]
    assert stripe_edges(60, 1, lag=7) == [0, 60]
    assert stripe_edges(60, 3, lag=0, last=0.5) == [0, 24, 48, 60]
    assert stripe_edges(3, 9, lag=1) == [0, 2, 3]  # more than there are rows
    assert stripe_edges(3, 2, lag=3) == [0, 3]


def test_rows_left_are_handed_on_in_the_order_of_frames() -> None:
    x = normal(1, 2, 5, 9, 3)
    windows: list[list[torch.Tensor]] = []
    for stripe, frames in zip(Stripe().split(9, 3, 3, lag=0), ([2, 3], [5], [1, 1, 3]), strict=True):
        new = x[..., stripe.taken, :]
        rows = [stripe.rows("layer", part) for part in new.split(frames, dim=2)]
        windows.append([each.fill(each.new.new_empty(1, 2, each.new.shape[2], each.count, 3)) for each in rows])
    first, middle, last = (torch.cat(parts, dim=2) for parts in windows)
    zeros = torch.zeros(1, 2, 5, 1, 3)
    assert torch.equal(first, torch.cat((zeros, x[..., :3, :]), dim=-2))
    assert torch.equal(middle, x[..., 1:6, :])
    assert torch.equal(last, torch.cat((x[..., 4:, :], zeros), dim=-2))


@pytest.mark.parametrize(("height", "count"), [(16, 2), (22, 3), (17, 4)])
@pytest.mark.parametrize(("stride", "multiple"), [(1, 1), (2, 1), (1, 2)])
def test_a_kernel_of_three_rows_gives_each_row_once(height: int, count: int, stride: int, multiple: int) -> None:
    height -= height % multiple
    x, kernel = normal(1, 1, 1, height, 1).double(), torch.tensor([1.0, 2.0, 4.0]).double()

    def convolved(window: torch.Tensor) -> torch.Tensor:
        return window.flatten().unfold(0, 3, stride) @ kernel

    zero = torch.zeros(1, 1, 1, 1, 1).double()
    expected = convolved(torch.cat((zero, x, zero), dim=-2))
    given, middles = [], []
    for stripe in Stripe().split(height, 1, count, lag=2):
        rows = stripe.rows("layer", x[..., stripe.taken, :], stride=stride, multiple=multiple)
        given.append(convolved(rows.fill(x.new_empty(1, 1, 1, rows.count, 1))))
        assert given[-1].numel() % multiple == 0
        middles += [piece for _, piece in rows.pieces(rows.middle, given[-1].numel())]
    assert torch.equal(torch.cat(given), expected)
    if stride == 1:
        assert torch.equal(torch.cat(middles, dim=-2), x)


def test_pieces_are_views_in_their_places() -> None:
    above, new = normal(1, 1, 1, 2, 1), normal(1, 1, 1, 3, 1, seed=2)
    rows = Rows(new, above, has_borders=True)
    joined = torch.cat((above, new), dim=-2)
    assert torch.equal(rows.joined(), joined)
    for start in range(5):
        for count in range(1, 6 - start):
            pieces = list(rows.pieces(start, count))
            assert torch.equal(torch.cat([piece for _, piece in pieces], dim=-2), joined[..., start : start + count, :])
