"""Every kernel variant of attention: accuracy, rows that overflow, independence, fallbacks and configurations."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from support.attention import attention_fp64, make_projection
from support.numbers import TOLERANCE, relative_error

from tritontower.kernels.attention import fixed_max, online_softmax, single_block
from tritontower.kernels.attention.attention import (
    FlashAttentionConfig,
    choose_config,
    default_config,
    flash_attention_varlen,
)
from tritontower.kernels.gemm.qkv_projection import qkv_projection, reorder_heads
from tritontower.kernels.runtime import config as configs
from tritontower.kernels.runtime import dispatch, registry
from tritontower.kernels.runtime.segments import Segments

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ONLINE = FlashAttentionConfig(32, 32, 4, 1)
FIXED = FlashAttentionConfig(32, 32, 4, 1, "fixed")
SINGLE_BLOCK = FlashAttentionConfig(64, 64, 4, 1, "single_block")
RAGGED = Segments([1, 32, 45, 0, 64, 97])
WINDOWS = Segments([64, 1, 0, 33, 64, 16])
LOG2_E = math.log2(math.e)

WALKING = [
    pytest.param(config, dtype, id=f"{config.variant}-{str(dtype).removeprefix('torch.')}")
    for config in (ONLINE, FIXED)
    for dtype in (BF16, FP16, FP32)
]
"""Variants that loop over the keys."""


def turned(qkv, cosines, sines, *, heads, head_dim, padded_head_dim):
    """Rotates a projection with adjacent pairs of columns; returns ``[T, 3, H, head_dim]`` in fp64."""
    qkv = qkv.unflatten(1, (3, heads, padded_head_dim))[..., :head_dim]
    if cosines is None:
        return qkv
    first, second = qkv[:, :2, :, ::2], qkv[:, :2, :, 1::2]
    cosine, sine = cosines.double()[:, None, None], sines.double()[:, None, None]
    pairs = torch.stack((first * cosine - second * sine, second * cosine + first * sine), -1)
    return torch.cat((pairs.flatten(-2), qkv[:, 2:]), 1)


@pytest.fixture
def launches(monkeypatch):
    """The variants that were launched, in order."""
    seen = []
    for name, module in {"online": online_softmax, "fixed": fixed_max, "single_block": single_block}.items():

        def record(*arguments, _launch=module.launch, _name=name):
            seen.append(_name)
            return _launch(*arguments)

        monkeypatch.setattr(module, "launch", record)
    return seen


class TestNumbers:
    @pytest.mark.parametrize(("config", "dtype"), WALKING)
    @pytest.mark.parametrize("head_dim", [16, 36, 64, 72, 80, 88, 104, 128])
    def test_head_dims(self, kernel_device, poisoned_empty, launches, config, dtype, head_dim):
        q, k, v = make_projection(RAGGED, head_dim, dtype, kernel_device)
        out = flash_attention_varlen(q, k, v, RAGGED, config=config)
        assert relative_error(out, attention_fp64(q, k, v, RAGGED, head_dim**-0.5)) <= TOLERANCE[dtype]
        assert launches == [config.variant]

    @pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
    @pytest.mark.parametrize("head_dim", [16, 64, 80, 104])
    def test_single_block(self, kernel_device, poisoned_empty, launches, dtype, head_dim):
        q, k, v = make_projection(WINDOWS, head_dim, dtype, kernel_device)
        out = flash_attention_varlen(q, k, v, WINDOWS, config=SINGLE_BLOCK, length_bound=64)
        assert relative_error(out, attention_fp64(q, k, v, WINDOWS, head_dim**-0.5)) <= TOLERANCE[dtype]
        assert launches == ["single_block"]

    @pytest.mark.parametrize("config", [ONLINE, FIXED, SINGLE_BLOCK], ids=lambda config: config.variant)
    @pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
    @pytest.mark.parametrize(("head_dim", "width"), [(72, 80), (64, 80), (60, 64), (100, 104)])
    def test_padded_heads(self, kernel_device, poisoned_empty, launches, config, dtype, head_dim, width):
        """Queries that are already scaled: no additional rounding."""
        q, k, v = make_projection(WINDOWS, head_dim, dtype, kernel_device, width=width)
        q *= 0.18
        scale = math.log(2)
        how = {"columns": head_dim, "length_bound": 64, "config": config}
        out = flash_attention_varlen(q, k, v, WINDOWS, scale=scale, **how)
        assert out.shape == (WINDOWS.total, 2, head_dim)
        assert out.is_contiguous()
        counted = [tensor[..., :head_dim] for tensor in (q, k, v)]
        assert relative_error(out, attention_fp64(*counted, WINDOWS, scale)) <= TOLERANCE[dtype]
        # Scores times one, or scores as they are.
        assert torch.equal(flash_attention_varlen(q, k, v, WINDOWS, queries_scaled=True, **how), out)

    @pytest.mark.parametrize("norm", [1, 2, 3])
    def test_padding_costs_no_accuracy(self, kernel_device, norm):
        """Queries are not rounded again before the matmul, which large scores would show."""
        q, k, v = make_projection(RAGGED, 72, BF16, kernel_device, width=80)
        q[..., :72] *= norm
        k[..., :72] *= norm
        counted = [tensor[..., :72] for tensor in (q, k, v)]
        truth = attention_fp64(*counted, RAGGED, 72**-0.5)
        usual = relative_error(flash_attention_varlen(*counted, RAGGED, config=ONLINE), truth)
        out = flash_attention_varlen(q, k, v, RAGGED, columns=72, config=FIXED)
        assert relative_error(out, truth) <= 1.12 * usual

    @pytest.mark.parametrize(
        ("rotated", "dtype", "config", "norm"),
        [(False, BF16, FIXED, 1), (True, BF16, FIXED, 2), (True, BF16, ONLINE, 2), (True, FP16, ONLINE, 0.1),
         (True, FP32, ONLINE, 1)],
    )  # fmt: skip
    def test_scaled_queries_cost_no_accuracy(self, kernel_device, config, rotated, dtype, norm):
        """From projection to output: scaled before the only rounding, or after it and in every score."""
        heads, inner, segments = 2, 64, Segments([64, 97])
        generator = torch.Generator().manual_seed(7)

        def normal(*shape, scale=1.0):
            return (torch.randn(shape, generator=generator) * scale).to(kernel_device)

        tables = [table.contiguous() for angle in [normal(segments.total, 36)] for table in (angle.cos(), angle.sin())]
        tables = tables if rotated else [None, None]
        layout = {"heads": heads, "head_dim": 72, "padded_head_dim": 80}
        wrong = {False: 0.0, True: 0.0}
        for _ in range(2):
            x, weight, bias = normal(segments.total, inner), normal(432, inner, scale=inner**-0.5), normal(432)
            weight[:288], bias[:288] = norm * weight[:288], norm * bias[:288]
            weight, bias = (reorder_heads(t.to(dtype), **layout, ones=t.dim() == 1) for t in (weight, bias))
            x = x.to(dtype)
            exact = turned(x.double() @ weight.double().T + bias.double(), *tables, **layout)
            truth = attention_fp64(*exact.unbind(1), segments, 72**-0.5)
            for scaled in wrong:
                options = {"query_scale": 72**-0.5 * LOG2_E} if scaled else {}
                qkv = qkv_projection(x, weight, bias, *tables, **layout, **options).unflatten(1, (3, heads, 80))
                how = {"queries_scaled": True, "config": config} if scaled else {"config": ONLINE}
                out = flash_attention_varlen(*qkv.unbind(1), segments, columns=72, **how)
                wrong[scaled] += float((out.double().cpu() - truth).square().sum())
        assert wrong[True] <= 1.1**2 * wrong[False]

    @pytest.mark.parametrize("config", [ONLINE, FIXED], ids=lambda config: config.variant)
    def test_views(self, kernel_device, config):
        """Token-major queries, head-major keys, values with gaps, and a result in the middle of something else."""
        generator = torch.Generator().manual_seed(5)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(kernel_device, BF16)

        q = normal(RAGGED.total, 2, 80)
        k = normal(2, RAGGED.total, 80).transpose(0, 1)
        v = normal(RAGGED.total, 5, 88)[:, 1:5:2, :80]
        buffer = torch.full((RAGGED.total, 3, 96), 7.0, dtype=BF16, device=kernel_device)
        out = buffer[:, 1:, 8:88]
        flash_attention_varlen(q, k, v, RAGGED, config=config, out=out)
        assert relative_error(out, attention_fp64(q, k, v, RAGGED, 80**-0.5)) <= TOLERANCE[BF16]
        out.fill_(7.0)
        assert bool((buffer == 7.0).all())


def boosted(boost, where, dtype, device, *, head_dim=64, width=None, scale):
    """Adds ``boost`` (in units of log 2) to scores in a segment of 97 rows: of its last key, of early ones, or per row."""
    segments = Segments([97, 40])
    q, k, v = (t.clone() for t in make_projection(segments, head_dim, dtype, device, heads=1, width=width, seed=3))
    q[..., 0], k[..., 0] = 1, 0
    step = boost / (scale * LOG2_E)
    if where == "last block":
        k[96, :, 0] = step
    elif where == "before it":
        k[10, :, 0] = step
        k[30, :, 0] = step
    else:
        # One key scores high for some rows, low for others, and equal for the rest.
        q[..., 0] = torch.tensor([1.0, -1.0, 0.0, 0.25])[torch.arange(segments.total) % 4, None].to(q)
        k[5, :, 0], k[96, :, 0] = step, -step
    return q, k, v, segments


class TestFarApart:
    # Within all ranges; too far for fp16; above the limit for bf16; above fp32.
    @pytest.mark.parametrize("boost", [20, 60, 100, 400])
    @pytest.mark.parametrize("where", ["last block", "before it", "row by row"])
    @pytest.mark.parametrize(("config", "dtype"), WALKING)
    def test_scores_far_apart(self, kernel_device, config, dtype, where, boost):
        scale = 64**-0.5
        q, k, v, segments = boosted(boost, where, dtype, kernel_device, scale=scale)
        out = flash_attention_varlen(q, k, v, segments, config=config)
        # Scores of magnitude S carry an absolute error of about S · 2⁻²⁴ in fp32, which the exponential makes relative.
        tolerance = TOLERANCE[dtype] + boost * 2.0**-22
        assert relative_error(out, attention_fp64(q, k, v, segments, scale)) <= tolerance

    @pytest.mark.parametrize("boost", [20, 60, 100, 400])
    @pytest.mark.parametrize("where", ["last block", "before it", "row by row"])
    def test_in_padded_heads(self, kernel_device, where, boost):
        """The softmax offset is rounded here, which moves it far from a large maximum."""
        scale = math.log(2)
        q, k, v, segments = boosted(boost, where, BF16, kernel_device, head_dim=72, width=80, scale=scale)
        q[..., 1:72] *= 0.17
        out = flash_attention_varlen(q, k, v, segments, config=FIXED, queries_scaled=True, columns=72)
        counted = [tensor[..., :72] for tensor in (q, k, v)]
        tolerance = TOLERANCE[BF16] + boost * 2.0**-22
        assert relative_error(out, attention_fp64(*counted, segments, scale)) <= tolerance

    def test_values_that_overflow_before_the_sum_does(self, kernel_device):
        q, k, v, segments = boosted(80, "before it", BF16, kernel_device, scale=64**-0.5)
        v *= 1e25
        out = flash_attention_varlen(q, k, v, segments, config=FIXED)
        assert relative_error(out, attention_fp64(q, k, v, segments, 64**-0.5)) <= TOLERANCE[BF16] + 80 * 2.0**-22

    @pytest.mark.parametrize(("config", "dtype"), WALKING)
    def test_out_may_be_q_if_rows_are_recomputed(self, kernel_device, config, dtype):
        q, k, v, segments = boosted(140, "row by row", dtype, kernel_device, scale=64**-0.5)
        expected = attention_fp64(q, k, v, segments, 64**-0.5)
        flash_attention_varlen(q, k, v, segments, config=config, out=q)
        assert relative_error(q, expected) <= TOLERANCE[dtype] + 140 * 2.0**-22

    @pytest.mark.parametrize("variant", ["online", "fixed"])
    def test_a_row_does_not_depend_on_its_tile(self, kernel_device, variant):
        """Only overflowed rows are recomputed: tiles of another height give the same bits."""
        q, k, v, segments = boosted(140, "row by row", BF16, kernel_device, scale=64**-0.5)
        tall = flash_attention_varlen(q, k, v, segments, config=FlashAttentionConfig(128, 32, 4, 1, variant))
        short = flash_attention_varlen(q, k, v, segments, config=FlashAttentionConfig(16, 32, 4, 1, variant))
        assert torch.equal(tall, short)


NEIGHBORS = [(ONLINE, BF16, 72), (ONLINE, FP32, 80), (FIXED, BF16, 72), (FIXED, FP16, 80)]


class TestNeighbors:
    @pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy warns of the neighbors' NaN
    @pytest.mark.filterwarnings("ignore:invalid value")
    @pytest.mark.parametrize(("config", "dtype", "head_dim"), NEIGHBORS)
    @pytest.mark.parametrize("length", [1, 64, 97])
    def test_the_same_bits_alone_and_between_nan(self, kernel_device, config, dtype, head_dim, length):
        self.check(kernel_device, config, dtype, head_dim, None, length, {})

    @pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value")
    @pytest.mark.parametrize("length", [1, 64, 97])
    def test_in_padded_heads(self, kernel_device, length):
        self.check(kernel_device, FIXED, BF16, 72, 80, length, {"columns": 72})

    @pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value")
    @pytest.mark.parametrize("length", [1, 33, 64])
    def test_in_a_single_block(self, kernel_device, length):
        self.check(kernel_device, SINGLE_BLOCK, BF16, 80, None, length, {"length_bound": 64})

    def check(self, device, config, dtype, head_dim, width, length, options):
        """First, between NaN, and last in a batch; NaN follows directly, where a whole block of keys reaches."""
        other = min(60, options.get("length_bound", 130))
        segments = Segments([length, other, length, other, 5, length])
        q, k, v = (t.clone() for t in make_projection(segments, head_dim, dtype, device, width=width))
        starts = [int(segments.cu_seqlens[index]) for index in (0, 2, 5)]
        for tensor in (q, k, v):
            for start in starts[1:]:
                tensor[start : start + length] = tensor[:length]
            for index in (1, 3):
                tensor[segments.cu_seqlens[index] : segments.cu_seqlens[index + 1]] = float("nan")
        alone = flash_attention_varlen(q[:length], k[:length], v[:length], Segments([length]), config=config, **options)
        batch = flash_attention_varlen(q, k, v, segments, config=config, **options)
        assert bool(torch.isfinite(alone).all())
        for start in starts:
            assert torch.equal(batch[start : start + length], alone)
        assert bool(torch.isnan(batch[length : length + other]).all())

    @pytest.mark.parametrize("config", [ONLINE, FIXED, SINGLE_BLOCK], ids=lambda config: config.variant)
    def test_padding_tiles_write_nothing(self, kernel_device, config):
        """Tiles after the end of a segment, and of segments without rows."""

        class Planned(Segments):
            def tiles(self, block_rows, device):
                beyond = torch.tensor([[0, 40], [2, 0], [4, 1]], dtype=torch.int32)
                return torch.cat([super().tiles(block_rows, device), beyond.to(device)])

        lengths = [33, 64, 0, 20, 7]
        q, k, v = make_projection(Segments(lengths), 80, BF16, kernel_device)
        buffer = torch.full((q.shape[0] + 50, 2, 80), 7.0, dtype=BF16, device=kernel_device)
        out = buffer[: q.shape[0]]
        options = {"config": config, "length_bound": 64}
        flash_attention_varlen(q, k, v, Planned(lengths), out=out, **options)
        assert torch.equal(out, flash_attention_varlen(q, k, v, Segments(lengths), **options))
        assert bool((buffer[q.shape[0] :] == 7.0).all())


def test_fixed_where_its_compiler_rejects_it(kernel_device, launches, monkeypatch):
    monkeypatch.setattr(fixed_max, "ARCHITECTURES", ())
    q, k, v = make_projection(RAGGED, 64, BF16, kernel_device)
    out = flash_attention_varlen(q, k, v, RAGGED, config=FIXED)
    assert relative_error(out, attention_fp64(q, k, v, RAGGED, 64**-0.5)) <= TOLERANCE[BF16]
    assert launches == ["online"]


class TestConfigurations:
    @pytest.mark.parametrize("architecture", [*configs.ARCHITECTURES, "interpreter"])
    @pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
    def test_defaults(self, architecture, dtype):
        for head_dim in (16, 64, 72, 80, 88, 96, 104, 128):
            for bound in (None, 16, 64, 65, 4096):
                chosen = default_config(head_dim, dtype, architecture, length_bound=bound)
                if dtype == FP32 and architecture != "interpreter":
                    assert chosen.variant == "online"
                elif bound in (16, 64):
                    assert chosen.variant == "single_block"
                    assert chosen.block_keys >= bound
                elif dtype == BF16 and architecture in ("sm_80", "sm_89", "sm_90", "sm_120"):
                    assert chosen.variant == "fixed"
                else:
                    assert chosen.variant == "online"
            assert default_config(head_dim, dtype, architecture).variant in ("online", "fixed")
            # A batch changes only the height of tiles: anything else would change the order of the sums.
            usual = default_config(head_dim, dtype, architecture)
            for longest in (1, 64, 65, 5000):
                chosen = default_config(head_dim, dtype, architecture, longest=longest)
                assert replace(chosen, block_queries=128, num_warps=4) == replace(usual, block_queries=128, num_warps=4)
                assert chosen.block_queries <= usual.block_queries

    def test_a_tuned_configuration_is_taken(self, request):
        request.addfinalizer(registry.clear)
        cpu = torch.device("cpu")
        tuned = FlashAttentionConfig(64, 64, 4, 1, "single_block")
        entries = [
            {"kernel": "attention.attention", "dtype": "bfloat16", "sizes": {"longest": 64}, "config": asdict(tuned),
             "constants": {"head_dim": 72, "padded": padded, "bounded": bound}}
            for padded, bound in ((True, 64), (False, 0))
        ]  # fmt: skip
        registry.fill(cpu, [registry.TunedTable(entries)])
        assert choose_config(72, BF16, cpu, padded=True, longest=50, length_bound=64) == tuned
        # Without a bound a segment may be longer than the single block.
        unbounded = choose_config(72, BF16, cpu, padded=False, longest=0, length_bound=None)
        assert unbounded == default_config(72, BF16, "interpreter", longest=0)

    def test_an_unknown_variant(self):
        with pytest.raises(ValueError, match="variant must be one of online, fixed, single_block, got 'magic'"):
            FlashAttentionConfig(64, 64, 4, 2, "magic")


def test_reference_of_padded_heads():
    q, k, v = make_projection(RAGGED, 72, FP32, "cpu", width=80)
    with dispatch.use("reference"):
        out = flash_attention_varlen(q, k, v, RAGGED, columns=72)
        scaled = flash_attention_varlen(q * (72**-0.5 * LOG2_E), k, v, RAGGED, columns=72, queries_scaled=True)
    for result in (out, scaled):
        truth = attention_fp64(*(tensor[..., :72] for tensor in (q, k, v)), RAGGED, 72**-0.5)
        assert relative_error(result, truth) <= TOLERANCE[FP32]


@pytest.mark.parametrize(("boost", "tiles"), [(0, 0), (60, 0), (140, 4)])
@pytest.mark.parametrize("width", [64, 80])
def test_few_tiles_are_recomputed(kernel_device, boost, tiles, width):
    """Otherwise the kernel would be right, but no faster than the online softmax."""
    padded = {"columns": 60} if width == 64 else {}
    head_dim = padded.get("columns", width)
    q, k, v, segments = boosted(
        boost, "before it", BF16, kernel_device, head_dim=head_dim, width=width, scale=math.log(2)
    )
    q[..., 1:head_dim] *= 0.17
    recomputed = torch.zeros(1, dtype=torch.int32, device=kernel_device)
    flash_attention_varlen(q, k, v, segments, config=FIXED, queries_scaled=True, recomputed=recomputed, **padded)
    assert int(recomputed) == tiles


def test_the_offset_comes_from_as_many_keys_as_a_block(kernel_device):
    """In the last block alone, one key left by the length would decide, and recompute nearly everything."""
    q, k, v, segments = boosted(140, "last block", BF16, kernel_device, scale=64**-0.5)
    k[96], k[80] = k[80].clone(), k[96].clone()
    recomputed = torch.zeros(1, dtype=torch.int32, device=kernel_device)
    flash_attention_varlen(q, k, v, segments, config=FIXED, recomputed=recomputed)
    assert int(recomputed) == 0


ROUNDING = [
    pytest.param(config, dtype, head_dim, marks=() if head_dim == 80 and dtype == BF16 else pytest.mark.slow)
    for config, dtype in [*(case.values for case in WALKING), (SINGLE_BLOCK, BF16), (SINGLE_BLOCK, FP16)]
    for head_dim in (64, 72, 80, 88, 104, 128)
    if dtype != FP32
]


@pytest.mark.parametrize(("config", "dtype", "head_dim"), ROUNDING)
def test_error_with_the_logits_of_trained_towers(kernel_device, config, dtype, head_dim):
    """Errs hardly more than torch's attention of the same dtype, whatever the standard deviation of the logits."""
    segments = Segments([64, 50, 64] if config is SINGLE_BLOCK else [150, 97])
    attend = torch.nn.functional.scaled_dot_product_attention
    found = {}
    for deviation in (1, 3, 6, 12, 20, 40):
        q, k, v = make_projection(segments, head_dim, dtype, kernel_device, seed=deviation)
        q = q * deviation
        truth = attention_fp64(q, k, v, segments)
        ours = flash_attention_varlen(q, k, v, segments, config=config, length_bound=max(segments.lengths))
        parts = zip(*(tensor.cpu().split(segments.lengths) for tensor in (q, k, v)), strict=True)
        # With a batch dimension torch rounds the weights, as on a GPU.
        theirs = [attend(*(part.transpose(0, 1)[None] for part in each))[0].transpose(0, 1) for each in parts]
        found[deviation] = relative_error(ours, truth) / relative_error(torch.cat(theirs), truth)
    assert max(found.values()) <= 1.1, found
