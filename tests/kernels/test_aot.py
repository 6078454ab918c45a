"""What the compiler makes of the Triton kernels, for GPUs that need not be here.

`aot.main` compiles every configuration. These tests compile ReLU and the count alone. The arithmetic of other activations is
tested on the GPU and in the dtype for which memory leaves the least time.
"""

import re
from functools import cache

import pytest

pytest.importorskip("triton")

import triton

from fastentropy_kernels import activations_triton, aot
from fastentropy_kernels.activations import ACTIVATIONS
from fastentropy_kernels.aot import Findings, Variant, inspection
from fastentropy_kernels.aot.chains import LAYERS, ChainVariant, chain_variants, compile_chain
from fastentropy_kernels.chains import launch_triton as chains_triton
from fastentropy_kernels.states import kernels_triton, launch_triton

pytestmark = pytest.mark.skipif(activations_triton.INTERPRETED, reason="an interpreted function cannot be compiled")

NVIDIA = ["sm_80", "sm_90", "sm_100"]
EACH_KERNEL = [
    pytest.mark.slow,
    pytest.mark.parametrize("layout", aot.SHAPES),
    pytest.mark.parametrize("dtype", ["bf16", "fp32"]),
    pytest.mark.parametrize("activation", ["relu", None]),
]


def each_kernel(test):
    for parameters in EACH_KERNEL:
        test = parameters(test)
    return test


def variant(layout, dtype="bf16", activation="relu", **changed):
    return Variant(layout, dtype, activation, aot.SHAPES[layout])._replace(**changed)


compiled = cache(aot.compile_variant)
findings = cache(aot.examine)
disassembled = cache(lambda variant, arch: inspection.disassemble(compiled(variant, arch)))


def opcodes(code, pattern):
    return re.findall(rf"\b(?:{pattern})\b[.\w]*", "\n".join(code))


@each_kernel
@pytest.mark.parametrize("arch", aot.TARGETS)
def test_every_access_is_16_bytes_wide(layout, dtype, activation, arch):
    found = findings(variant(layout, dtype, activation), arch)
    assert found.loads == (16,)
    assert found.stores == ((16,) if activation else ())


@each_kernel
@pytest.mark.parametrize("arch", NVIDIA)
def test_ptx_accesses_are_wide(layout, dtype, activation, arch):
    ptx = compiled(variant(layout, dtype, activation), arch).asm["ptx"]
    accesses = re.findall(r"\b(?:ld|st)\.(?:global|local)\S*", ptx)
    assert any(access.startswith("st") for access in accesses) == (activation is not None)
    assert all(re.fullmatch(r"(ld|st)\.global\S*\.(v4\.b32|v2\.b64)", access) for access in accesses), accesses


@each_kernel
@pytest.mark.parametrize("arch", aot.TARGETS)
def test_registers_suffice(layout, dtype, activation, arch):
    assert not findings(variant(layout, dtype, activation), arch).spilled


@pytest.mark.slow
@pytest.mark.parametrize("layout", aot.SHAPES)
@pytest.mark.parametrize(("dtype", "arch"), [("bf16", "sm_80"), ("fp32", "sm_90"), ("bf16", "sm_100"), ("bf16", "gfx942")])
def test_gate_is_read_16_bytes_wide(dtype, arch, layout):
    found = findings(variant(layout, dtype, "silu", gate=True, note="gate"), arch)
    assert (found.loads, found.stores) == ((16,), (16,))
    assert not found.spilled


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu_tanh"])
def test_memory_bounds_gated_activations(activation):
    kernel = variant("rows", activation=activation, gate=True, note="gate")
    assert aot.issue_share(kernel, "sm_90", findings(kernel, "sm_90").instructions) <= aot.ISSUE_LIMIT


CONFIGURATIONS = [each for each in aot.variants() if each.dtype == "bf16" and (each.note or each.line.startswith("small"))]


@pytest.mark.slow
@pytest.mark.parametrize("variant", CONFIGURATIONS, ids=str)
def test_registers_suffice_for_every_configuration(variant):
    assert not findings(variant, "sm_80").spilled


@each_kernel
@pytest.mark.parametrize("arch", NVIDIA)
def test_few_atomics_and_none_in_the_loop(layout, dtype, activation, arch):
    code = disassembled(variant(layout, dtype, activation), arch)
    atomics = "REDG?|ATOMG?"
    assert 1 <= len(opcodes([code], atomics)) <= 4
    assert not opcodes(inspection.main_loop(code), atomics)


@pytest.mark.slow
@pytest.mark.parametrize(("changed", "states"), [({"nan": True}, 5), ({"edges": 15}, 16), ({"edges": 1, "nan": True}, 3)])
def test_one_atomic_per_counter(changed, states):
    line = "histogram rows" if "edges" in changed else "rows"
    code = disassembled(variant("rows", **changed)._replace(line=line), "sm_90")
    assert len(opcodes([code], "REDG?|ATOMG?")) == states


@each_kernel
@pytest.mark.parametrize("arch", NVIDIA)
def test_comparisons_flush_no_subnormals(layout, dtype, activation, arch):
    kernel = variant(layout, dtype, activation)
    setp = re.findall(r"\bsetp\.\S*", compiled(kernel, arch).asm["ptx"])
    comparisons = opcodes([disassembled(kernel, arch)], "FSETP|FSET|HSETP2|HSET2")
    assert setp
    assert comparisons
    assert not [each for each in setp + comparisons if "ftz" in each.lower()]


@pytest.mark.slow
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("layout", aot.SHAPES)
def test_offsets_have_64_bits(layout, mask):
    ttir = compiled(variant(layout, mask=mask), "sm_90").asm["ttir"]
    offsets = re.findall(r"tt\.addptr .*!tt\.ptr<(?:bf16|i1|i8)>>?, (?:tensor<\w*x)?(i\d+)", ttir)
    assert len(offsets) >= 2
    assert set(offsets) == {"i64"}


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2**31 + 16, 16), (1, 1, 2**31 + 16)])
def test_sizes_have_64_bits(shape):
    layout = "rows" if len(shape) == 2 else "planes"
    ttir = compiled(variant(layout, shape=shape), "sm_90").asm["ttir"]
    assert not re.findall(r".*arith\.muli .*: i32.*", ttir)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), (1, 256), (200, 1), (1, 1, 2), (1, 1, 16), (1, 256, 49), (64, 1, 16)], ids=str)
def test_sizes_of_one_compile(shape):
    layout = "rows" if len(shape) == 2 else "planes"
    assert compiled(variant(layout, activation="prelu", shape=shape), "sm_90").asm["cubin"]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "most"), [("rows", 8), ("planes", 10)])
def test_relu_instructions_per_element(layout, most):
    # 7.8 and 9.2. Triton 3.6 computes the maximum in float32: 1.6 more.
    most += 2 * triton.__version__.startswith("3.6.")
    assert findings(variant(layout), "sm_90").instructions <= most


# Activation -> the percentage of what an H100 can issue that it may take, for bfloat16 rows, with Triton 3.6 and 3.8. An H100
# can issue 40 instructions per element. These take more than half, for exponentials and divisions or the polynomial of gelu.
MOST = {"elu": 77, "selu": 82, "celu": 85, "gelu": 58, "mish": 70, "softplus": 105}


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_memory_is_the_bound(activation):
    kernel = variant("rows", activation=activation)
    share = aot.issue_share(kernel, "sm_90", findings(kernel, "sm_90").instructions)
    assert 100 * share <= MOST.get(activation, 100 * aot.ISSUE_LIMIT)


def test_issue_share_of_a_known_case():
    # 132 x 128 instructions at 1.98 GHz in the time of 4 bytes at 3.35 TB/s are 39.9.
    assert aot.issue_share(variant("rows"), "sm_90", 39.94) == pytest.approx(1, abs=1e-3)
    assert aot.issue_share(variant("rows", "fp32"), "sm_90", 39.94) == pytest.approx(0.5, abs=1e-3)
    assert aot.issue_share(variant("rows", activation=None), "sm_90", 39.94) == pytest.approx(2, abs=1e-3)
    assert aot.issue_share(variant("rows"), "sm_100", 39.94) is None


def test_variants_are_complete():
    kernels = aot.variants()
    assert len(set(kernels)) == len(kernels)
    assert {each.line for each in kernels} == set(launch_triton.LAUNCHES)
    for layout in aot.SHAPES:
        plain = {(each.dtype, each.activation) for each in kernels if each.line == layout and not each.note}
        assert plain == {(dtype, activation) for dtype in aot.DTYPES for activation in (None, *ACTIVATIONS)}


# Every chain, in some of the memory formats, alone or with everything, aligned or not.
SOME_CHAINS = [
    (ChainVariant("pointwise", "bf16", "", channels_last=True), "sm_90"),
    (ChainVariant("pointwise", "bf16", "7 x 7", everything=True), "sm_80"),
    (ChainVariant("depthwise pointwise", "fp32", "", everything=True), "gfx942"),
    (ChainVariant("bordered", "fp32", "", channels_last=True, everything=True), "sm_80"),
    (ChainVariant("bordered", "bf16", "7 x 7", channels_last=True, everything=True), "gfx942"),
    (ChainVariant("depthwise bordered", "bf16", "", everything=True), "sm_90"),
    (ChainVariant("linear pair", "bf16", "", everything=True), "sm_80"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("chain", "arch"), SOME_CHAINS, ids=str)
def test_registers_suffice_for_a_chain(chain, arch):
    assert not findings(chain, arch).spilled


@pytest.mark.slow
@pytest.mark.parametrize(("chain", "arch"), [each for each in SOME_CHAINS if not each[0].size and each[1] != "gfx942"], ids=str)
def test_chain_stores_are_16_bytes_wide(chain, arch):
    assert findings(chain, arch).stores == (16,)


@pytest.mark.slow
@pytest.mark.parametrize("chain", [chain for chain, _ in SOME_CHAINS if chain.kernel != "linear pair"], ids=str)
def test_chain_offsets_have_64_bits(chain):
    ttir = compile_chain(chain, "sm_90").asm["ttir"]
    offsets = re.findall(r"tt\.addptr .*tensor<(\d+)x(\d+)x!tt\.ptr<\w+>>, tensor<\w*x(i\d+)>", ttir)
    tiles = [width for height, breadth, width in offsets if "1" not in (height, breadth)]
    assert len(tiles) >= 2
    assert set(tiles) == {"i64"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_product_uses_tf32(dtype):
    ttir = compile_chain(ChainVariant("pointwise", dtype, ""), "sm_90").asm["ttir"]
    assert "tt.dot" in ttir
    assert "inputPrecision = tf32" not in ttir


def test_chain_variants_are_complete():
    chains = chain_variants()
    assert len(set(chains)) == len(chains)
    assert {chain.kernel for chain in chains} == set(LAYERS)
    kinds = {line.replace("16-bit", "").replace("float32", "").replace("narrow", "").strip() for line in chains_triton.LAUNCHES}
    assert kinds == set(LAYERS)
    for kernel in LAYERS:
        assert {chain.dtype for chain in chains if chain.kernel == kernel} == set(aot.DTYPES)


def test_main_loop_reads_most():
    sass = """
        /*0010*/    LDG.E.128 R4, desc[UR4][R2.64] ;    /* 0x0 */
        /*0020*/    @P0 BRA 0x10 ;                      /* 0x0 */
        /*0030*/    LDG.E.128 R4, desc[UR4][R2.64] ;    /* 0x0 */
        /*0040*/    @P1 LDG.E.U16 R8, [R2.64+0x10] ;    /* 0x0 */
        /*0050*/    BRA.U !UP0, 0x30 ;                  /* 0x0 */
        /*0060*/    BRA 0x60;                           /* 0x0 */
    """
    assert [instruction.split()[0] for instruction in inspection.main_loop(sass)] == ["LDG.E.128", "@P1", "BRA.U"]
    assert inspection.accesses(inspection.main_loop(sass), "LDG") == [16, 2]


def test_launches_are_restored():
    driver = triton.runtime.driver._active
    aot.compile_variant(variant("rows"), "sm_90")
    assert triton.runtime.driver._active is driver
    assert "run" not in vars(kernels_triton.states_rows_kernel)


SOUND = Findings(64, 0, 0, 1024, (16,), (16,), 8.5)


def report(monkeypatch, capsys, found, **changed):
    kernels = [variant("rows"), variant("planes", activation="gelu")]
    monkeypatch.setattr(aot, "variants", lambda: kernels)
    monkeypatch.setattr(aot, "chain_variants", lambda: [ChainVariant("depthwise pointwise", "bf16", "", True, True)])
    monkeypatch.setattr(aot, "examine_all", lambda work: [found._replace(**changed) for _ in work])
    status = aot.main(["--arch", "sm_80", "gfx942"])
    return status, capsys.readouterr().out


@pytest.mark.slow
def test_command_line(monkeypatch, capsys):
    monkeypatch.setattr(aot, "variants", lambda: [variant("rows"), variant("planes", activation=None)])
    monkeypatch.setattr(aot, "chain_variants", lambda: [ChainVariant("linear pair", "bf16", "")])
    assert aot.main(["--arch", "sm_90"]) == 0
    arch, heading, rows, planes, _, chain_heading, pair, *_ = capsys.readouterr().out.splitlines()
    assert arch == "sm_90"
    assert heading.split() == aot.HEADINGS.split()
    assert rows.split()[:4] == ["rows", "bf16", "relu", "-"]
    assert planes.split()[:4] == ["planes", "bf16", "-", "-"]
    assert rows.split()[5] == "0"
    assert chain_heading.split() == aot.CHAIN_HEADINGS.split()
    assert pair.split()[:4] == ["linear", "pair", "bf16", "-"]


def test_table_fits_80_columns(monkeypatch, capsys):
    status, text = report(monkeypatch, capsys, SOUND, loads=(16, 8, 1), instructions=123.4)
    assert status == 0
    assert max(map(len, text.splitlines())) <= 80
    assert "above half of the issue rate: 2 of 6\n  relu bf16 rows sm_80 323%\n  gelu bf16 planes sm_80 323%\n" in text


@pytest.mark.parametrize("changed", [{"spills": 2}, {"local_bytes": 8}])
def test_exit_status_of_a_spill(changed, monkeypatch, capsys):
    status, text = report(monkeypatch, capsys, SOUND, **changed)
    assert status == 1
    assert "spills or local memory: 6 of 6\n  relu bf16 rows sm_80\n" in text


def test_wrong_arguments_in_one_line(monkeypatch, capsys):
    assert aot.main(["--arch", "sm_90", "sm_12"]) == 2
    assert capsys.readouterr() == ("", "--arch: got 'sm_12', expected one of sm_80, sm_90, sm_100, gfx942\n")
    monkeypatch.setattr(activations_triton, "INTERPRETED", True)
    assert aot.main([]) == 2
    assert capsys.readouterr().err.startswith("TRITON_INTERPRET: set, expected a compiler")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.compile_variant(variant("rows"), "sm_90")
