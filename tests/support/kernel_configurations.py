"""Every compilation that a launch of the kernels in ops/gpu asks for, listed for the tests that compile or launch them."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl

from core.config import BLOCK_SIZE
from ops.formats import Routing
from ops.gpu import (
    around_attention,
    attention,
    attention_tiles,
    decode,
    decode_fp8,
    decode_runs,
    fused,
    gemm,
    grouped_gemm,
    moe,
    norm_latents,
    ordered_gemm,
    pdl,
    prefill,
    quantisation,
    router,
    sample,
    sort,
    tiles,
)
from ops.gpu.device import converts_fp8
from ops.gpu.tiles import Tile


@dataclass(frozen=True)
class Configuration:
    """One compilation that a launch in this file asks for."""

    name: str
    kernel: Any  # the @triton.jit function
    target: str  # a key of the tables
    types: dict[str, str]  # Triton's type of each run-time argument; pointers, N and K are multiples of 16
    constexprs: dict[str, Any]
    options: dict[str, int]  # num_warps and the like; what is not there is Triton's default


def _native(target: str) -> str:
    """Triton's type of pointers to the FP8 numbers that a target multiplies, or would."""
    return {"sm_80": "*u8", "gfx942": "*fp8e4b8"}.get(target, "*fp8e4nv")


def _e4m3(target: str) -> str:
    """Triton's type of pointers to float8_e4m3fn."""
    return "*fp8e4nv" if converts_fp8(torch.float8_e4m3fn, target) else "*u8"


def of_quantisation() -> Iterator[Configuration]:
    """act_quant and weight_dequant on each architecture of the tables."""
    scale, out = "*fp32", "*bf16"
    for target in tiles.W8A16:
        for ue8m0 in (False, True):
            yield Configuration(
                f"act_quant {target} {'ue8m0' if ue8m0 else 'float32'}",
                quantisation.act_quant_kernel,
                target,
                {"x_ptr": out, "q_ptr": _native(target), "s_ptr": scale, "M": "i32", "K": "i32"},
                {"GROUPS": quantisation.GROUPS, "BLOCK": BLOCK_SIZE, "UE8M0": ue8m0, "FNUZ": target == "gfx942"},
                pdl.options(target),
            )
        yield Configuration(
            f"weight_dequant {target}",
            quantisation.weight_dequant_kernel,
            target,
            {"w_ptr": _e4m3(target), "s_ptr": scale, "out_ptr": out, "N": "i32", "K": "i32"},
            {"ROWS": quantisation.DEQUANT_ROWS},
            {},
        )


WEIGHTS = {  # by table of tiles: a weight's type, None for that of FP8, its GROUP, and whether it has zero points
    "fp8_gemm": {"": (None, 0, False)},
    "w8a16_gemm": {"": (None, 0, False), " int8": ("*i8", 0, False)},
    "w4a16_gemm": {
        " int8 G=32": ("*i8", 32, False),
        " int8 G=128": ("*i8", 128, False),
        " G=32": ("*i32", 32, False),
        " G=128": ("*i32", 128, False),
        " G=32 zeros": ("*i32", 32, True),
        " G=128 zeros": ("*i32", 128, True),
    },
}


SELECTED = {  # what else than Hopper compiles of them: the kinds that take the most registers
    "sm_80": ("", " int8", " int8 G=32", " G=128", " G=32 zeros"),
    "sm_89": ("", " G=32 zeros"),
    "sm_100": ("", " int8 G=32", " G=128", " G=32 zeros"),
    "gfx942": ("", " int8 G=32", " G=128 zeros"),
}


def forms(op: str, target: str) -> list[str]:
    """The forms of weights that an op is compiled for."""
    return [form for form in WEIGHTS[op] if form in SELECTED.get(target, WEIGHTS[op])]


def of_gemm() -> Iterator[Configuration]:
    """Every tile that can be chosen for the GEMMs, by every form of weights, and the sum of the parts of K."""
    for target in tiles.W8A16:
        for split in tiles.SPLITS[1:]:
            yield Configuration(
                f"sum_splits {target} {split}",
                gemm.sum_splits_kernel,
                target,
                {"parts_ptr": "*fp32", "out_ptr": "*bf16", "M": "i32", "N": "i32"},
                {"PARTS": split, "SUMS": gemm.SUMS},
                pdl.options(target),
            )
    gemms = [gemm_configuration(*one, form) for one in tiles.reachable() for form in forms(*one[:2])]
    yield from {c.name: c for c in gemms}.values()  # a tile can serve several buckets, and any number of parts


def weight_types(op: str, form: str, target: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of the arguments that are a weight, and constants: those that are absent, and its GROUP."""
    w, group, zeros = WEIGHTS[op][form]
    types = {"w_ptr": w or (_native(target) if op == "fp8_gemm" else _e4m3(target))}
    types |= {"w_s_ptr": "*bf16" if group else "*fp32"} | ({"w_z_ptr": "*u8"} if zeros else {})
    return types, {"GROUP": group} | ({} if zeros else {"w_z_ptr": None})


def gemm_configuration(op: str, target: str, tile: Tile, form: str = "") -> Configuration:
    """What `gemm` asks for with a tile: where it splits K, that is partial sums, otherwise bfloat16."""
    weight, constant = weight_types(op, form, target)
    types = {
        "x_ptr": _native(target) if op == "fp8_gemm" else "*bf16",
        "out_ptr": "*fp32" if tile.split > 1 else "*bf16",
    }
    types |= weight | {"M": "i32", "N": "i32", "K": "i32"}
    if op == "fp8_gemm":
        types["x_s_ptr"] = "*fp32"
    else:
        constant["x_s_ptr"] = None
    if tile.persistent:
        constant = {}  # for FP8 by FP8 alone
    return Configuration(
        f"{op}{form} {target} {tile}",
        gemm.gemm_persistent_kernel if tile.persistent else gemm.gemm_kernel,
        target,
        types,
        tile.constexprs() | constant,
        tile.options() | ({} if tile.persistent else pdl.options(target)),
    )


def of_target(
    target: str,
    name: str,
    kernel: Any,
    pointers: dict[str, str | None],
    sizes: dict[str, str],
    tile: tuple[dict[str, int], dict[str, Any]],
    constexprs: dict[str, Any],
) -> Configuration:
    """One of a kernel with a tile that is constants and options; pointers without a type are absent."""
    types = {n: t for n, t in pointers.items() if t} | sizes
    absent = {n: None for n, t in pointers.items() if not t}
    options = tile[1] | pdl.options(target)
    return Configuration(f"{name} {target}", kernel, target, types, absent | tile[0] | constexprs, options)


def of_fused() -> Iterator[Configuration]:
    """Every kernel at the largest released sizes, in bfloat16, so that each of its branches occurs on each architecture
    (those that quantise where FP8 is multiplied)."""
    bf16, f32, size = "*bf16", "*fp32", "i32"
    for target in tiles.W8A16:
        native, fnuz, configuration = _fp8(target), target == "gfx942", partial(of_target, target)
        sizes = {"M": size, "H": size, "x_stride": size, "eps": "fp32"}
        for h, add, keep, fp8 in (
            (7168, True, True, None),
            (7168, True, True, "float32"),
            (7168, True, False, "float32"),
            (7168, False, False, "float32"),
            (7168, True, False, "ue8m0"),
        ):
            if fp8 and target not in tiles.W8A8:
                continue
            pointers = {
                "x_ptr": bf16,
                "delta_ptr": bf16 if add else None,
                "weight_ptr": f32,
                "total_ptr": bf16 if add else None,
                "y_ptr": bf16 if keep else None,
                "q_ptr": native if fp8 else None,
                "s_ptr": f32 if fp8 else None,
            }
            name = f"norm {h} {'add ' * add}{'keep ' * keep}{fp8}"
            constexprs = {"UE8M0": fp8 == "ue8m0", "FNUZ": fnuz and fp8 is not None}
            yield configuration(name, fused.norm_kernel, pointers, sizes, fused.norm_tile(h), constexprs)

        sizes = {"M": size, "inter": size, "up": size, "stride": size, "part_stride": size}
        for blocks, fp8, parts in (
            (fused.FEW_BLOCKS + 1, None, 1),
            (1, "float32", 1),
            (fused.FEW_BLOCKS + 1, "float32", 1),
            (fused.FEW_BLOCKS + 1, "ue8m0", 1),
            (1, None, 2),
            (1, "float32", 2),
            (1, "float32", 8),
        ):
            if fp8 and target not in tiles.W8A8:
                continue
            pointers = {
                "gate_up_ptr": bf16 if parts == 1 else f32,
                "y_ptr": None if fp8 else bf16,
                "q_ptr": native if fp8 else None,
                "s_ptr": f32 if fp8 else None,
            }
            formats = {"UE8M0": fp8 == "ue8m0", "FNUZ": fnuz and fp8 is not None}
            constexprs = formats | {"PARTS": parts, "ROUNDED": tl.bfloat16}
            name = f"silu_mul {'few' if blocks <= fused.FEW_BLOCKS else 'many'} {fp8}{f' {parts} parts' * (parts > 1)}"
            yield configuration(name, fused.silu_mul_kernel, pointers, sizes, fused.silu_mul_tile(blocks), constexprs)


def _fp8(target: str) -> str:
    """Triton's type of pointers to the FP8 numbers that a kernel makes."""
    return "*fp8e4b8" if target == "gfx942" else "*fp8e4nv"


def of_norm_latents() -> Iterator[Configuration]:
    """The norms of V3's latents and their write, for products as they are and in parts."""
    bf16, f32, size = "*bf16", "*fp32", "i32"
    for target in tiles.W8A16:
        native, fnuz, configuration = _fp8(target), target == "gfx942", partial(of_target, target)
        strides = ("kv_stride", "kv_part_stride", "q_stride", "q_part_stride")
        sizes = dict.fromkeys(("C", "R", "Q", *strides), size) | {"eps": "fp32"}
        tile = norm_latents.norm_latents_tile(512, 64, 1536)
        for pool, fp8, parts in ((bf16, None, 1), (bf16, "float32", 1), ("*u8", "ue8m0", 1), (bf16, "float32", 2), (bf16, "float32", 4)):
            if fp8 and target not in tiles.W8A8:
                continue
            pointers = {
                "kv_ptr": bf16 if parts == 1 else f32, "weight_ptr": f32, "cos_ptr": f32, "sin_ptr": f32,
                "slots_ptr": "*i64", "latents_ptr": pool, "scales_ptr": f32 if pool == "*u8" else None,
                "k_latents_ptr": bf16, "q_ptr": bf16 if parts == 1 else f32, "q_weight_ptr": f32,
                "y_ptr": None if fp8 else bf16, "y8_ptr": native if fp8 else None, "y_s_ptr": f32 if fp8 else None,
            }  # fmt: skip
            constexprs = {"UE8M0": fp8 == "ue8m0", "FNUZ": fnuz and fp8 is not None, "PARTS": parts, "ROUNDED": tl.bfloat16}
            name = f"norm_latents {'fp8' if pool == '*u8' else 'bf16'} {fp8}{f' {parts} parts' * (parts > 1)}"
            yield configuration(name, norm_latents.norm_latents_kernel, pointers, sizes, tile, constexprs)


def of_around_attention() -> Iterator[Configuration]:
    """Every kernel at V3's sizes and those of one rank of eight, for products as they are and in parts."""
    bf16, f32, size = "*bf16", "*fp32", "i32"
    for target in tiles.W8A16:
        native, fnuz, configuration = _fp8(target), target == "gfx942", partial(of_target, target)
        for n_heads, rows, parts in ((16, 16, 1), (16, 16, 2), (16, 32, 1), (16, 32, 2), (128, 32, 1)):
            for product in (True, False):
                if not product and parts > 1:
                    continue
                pointers = {
                    "q_ptr": bf16 if parts == 1 else f32, "w_uk_ptr": bf16 if product else None, "cos_ptr": f32,
                    "sin_ptr": f32, "out_ptr": bf16, "pe_ptr": bf16,
                }  # fmt: skip
                sizes = dict.fromkeys(("T", "q_stride", "q_part_stride"), size)
                constexprs = {"N": n_heads, "DN": 128, "R": 64, "C": 512, "PARTS": parts, "ROUNDED": tl.bfloat16}
                tile = around_attention.absorb_tile(128, 64, 512, rows)
                name = f"{'absorb' if product else 'rotary'} {n_heads} heads {rows} rows{f' {parts} parts' * (parts > 1)}"
                yield configuration(name, around_attention.absorb_kernel, pointers, sizes, tile, constexprs)

        for n_heads, tokens, dv, fp8 in (
            (16, 1, 128, "float32"), (16, 8, 128, "float32"), (16, 8, 128, "ue8m0"), (16, 128, 128, "float32"), (128, 32, 128, None), (16, 1, 192, None),
            (20, 128, 256, "float32"),
        ):  # fmt: skip
            if fp8 and target not in tiles.W8A8:
                continue
            pointers = {
                "partial_ptr": f32, "lse_ptr": f32, "parts_ptr": "*i32", "w_uv_ptr": bf16,
                "y_ptr": None if fp8 else bf16, "y8_ptr": native if fp8 else None, "y_s_ptr": f32 if fp8 else None,
            }  # fmt: skip
            constexprs = {"N": n_heads, "C": 512, "DV": dv, "ROUNDED": tl.bfloat16, "UE8M0": fp8 == "ue8m0"}
            constexprs["FNUZ"] = fnuz and fp8 is not None
            tile = around_attention.values_tile(tokens, dv, 512)
            sizes = dict.fromkeys(("first", "last", "stride"), size)
            name = f"values {n_heads} heads of {dv} {tile[0]['ROWS']} rows {fp8}"
            yield configuration(name, around_attention.values_kernel, pointers, sizes, tile, constexprs)


RULES = {  # experts and rule of the released models
    "V3": (256, Routing(8, "sigmoid", "noaux_tc", 8, 4, True, 2.5)),
    "K2": (384, Routing(8, "sigmoid", "noaux_tc", 1, 1, True, 2.827)),
    "V2": (160, Routing(6, "softmax", "group_limited_greedy", 8, 3, False, 16.0)),
    "GLM": (64, Routing(4, "sigmoid", "noaux_tc", 1, 1, True, 1.8)),
}


def of_router() -> Iterator[Configuration]:
    """The router at the sizes of four released models on each architecture."""
    scale, plain, index = "*fp32", "*bf16", "*i32"
    for target in router.ROUTER:
        for rule_name, (n_experts, rule) in RULES.items():
            for cut, x in [(cut, plain) for cut in router.ROUTER[target]] + [
                (cut, scale) for cut in router.ROUTER_FLOAT32
            ]:
                types = {
                    "x_ptr": x, "w_ptr": x, "bias_ptr": scale, "weights_ptr": scale, "ids_ptr": "*i64",
                    "partial_ptr": scale, "counter_ptr": index, "T": "i32", "H": "i32", "route_scale": "fp32",
                }  # fmt: skip
                constant = {"CHUNK": cut.chunk(7168)} | router.rule_constexprs(n_experts, rule) | cut.constexprs()
                if rule.score_func == "softmax":
                    del types["bias_ptr"]
                    constant["bias_ptr"] = None
                op = "router" if x == plain else "router_float32"
                name = f"{op} {target} {rule_name} {cut.block_t}x{cut.block_e}x{cut.splits}"
                options = {"num_warps": cut.warps} | pdl.options(target)
                yield Configuration(name, router.router_kernel, target, types, constant, options)


def of_sort() -> Iterator[Configuration]:
    """Every kernel for V3's experts on each architecture."""
    for target in tiles.GROUPED_PLAIN:
        types = {"ids_ptr": "*i64", "order_ptr": "*i32", "tiles_ptr": "*i32"}
        types |= {"n": "i32", "first": "i32", "n_tiles": "i32", "block_m": "i32"}
        for chunk in sort.CHUNKS:
            constant = {"N_LOCAL": 256, "CHUNK": chunk}
            yield Configuration(f"sort {target} {chunk}", sort.sort_kernel, target, types, constant, pdl.options(target))
        constant = {"N_LOCAL": 256, "CHUNK": sort.PLACED}
        counts = {"ids_ptr": "*i64", "counts_ptr": "*i32", "n": "i32", "first": "i32"}
        yield Configuration(f"count {target}", sort.count_kernel, target, counts, constant, {})
        warps = {"num_warps": sort.PLACE_WARPS}
        yield Configuration(
            f"place {target}", sort.place_kernel, target, types | counts, constant | {"STEP": sort.STEP}, warps
        )


def of_grouped_gemm() -> Iterator[Configuration]:
    """Every tile by every form of weights, as it is compiled for V3's sizes on each architecture."""
    scale, plain, index = "*fp32", "*bf16", "*i32"
    for target in tiles.GROUPED_PLAIN:
        grouped = (
            ("w8a8", "", tiles.GROUPED_W8A8, "*fp8e4b8" if target == "gfx942" else "*fp8e4nv"),
            *(("w8a16", form, tiles.GROUPED_W8A16, plain) for form in forms("w8a16_gemm", target)),
            *(("w4a16", form, tiles.GROUPED_W4A16, plain) for form in forms("w4a16_gemm", target)),
            ("plain", "", tiles.GROUPED_PLAIN, plain),
            ("float32", "", {target: tiles.GROUPED_FLOAT32}, scale),
        )
        for op, form, tables, x in grouped:
            table = tables.get(target, ())
            for row in table:
                if row.persistent:
                    continue
                # gate and up, and down when the inner width is split 8 ways; gate and up for the fewest rows in parts
                halved = [(replace(row, split=2), 7168, 8)] if row is table[0] else []
                found = [(*one, None) for one in [(row, 7168, 8), (row, 256, 1), *halved]]
                if op == "w8a8" and row is table[0]:  # of few assignments that nobody has sorted
                    found += [(tile, 7168, 8, chunk) for chunk in grouped_gemm.CHUNKS for tile, *_ in [(row,), *halved]]
                    found += [(row, 256, 1, 0)]
                for tile, k, share, chunk in found:
                    out = scale if op == "float32" or tile.split > 1 else plain
                    if op in ("plain", "float32"):
                        weight, constant = {"w_ptr": x}, {"w_s_ptr": None, "w_z_ptr": None, "GROUP": 0}
                    else:
                        weight, constant = weight_types("fp8_gemm" if op == "w8a8" else f"{op}_gemm", form, target)
                    types = {"x_ptr": x, "out_ptr": out} | weight
                    types |= {"order_ptr": index, "tiles_ptr": index}
                    own = {"shared_w_ptr": x, "shared_s_ptr": scale}
                    types |= ({} if chunk is None else own) | ({"ids_ptr": "*i64"} if chunk else {})
                    constant |= dict.fromkeys(own if chunk is None else ()) | ({} if chunk else {"ids_ptr": None})
                    constant |= {"N_LOCAL": 256, "CHUNK": chunk or 0, "EARLY": chunk == 0}
                    types |= dict.fromkeys(("m_tiles", "assignments", "tokens", "first", "N", "K"), "i32")
                    constant |= tile.for_channels(k).constexprs() | {"SHARE": share}
                    if op == "w8a8":
                        types["x_s_ptr"] = scale
                    else:
                        constant["x_s_ptr"] = None
                    size = f"{tile.block_m}x{tile.block_n} K={k}{' split' * (tile.split > 1)}"
                    size += "" if chunk is None else f" in place {chunk}" if chunk else " found"
                    name = f"grouped_{op}{form} {target} {size}"
                    options = tile.options() | pdl.options(target)
                    yield Configuration(name, grouped_gemm.grouped_gemm_kernel, target, types, constant, options)


def of_ordered_gemm() -> Iterator[Configuration]:
    """What puts rows in order, and the persistent tiles, as they are compiled for V3's sizes."""
    scale, index = "*fp32", "*i32"
    for target, table in tiles.GROUPED_W8A8.items():
        persistent = [tile for tile in table if tile.persistent]
        if persistent:
            types = {"x_ptr": "*u8", "x_s_ptr": scale, "out_ptr": "*u8", "out_s_ptr": scale}
            types |= {"order_ptr": index, "tiles_ptr": index, "K": "i32"}
            constant = {"SHARE": 8, "ROWS": ordered_gemm.GATHERED_ROWS, "BLOCK_M": 128, "BLOCKS": 64}
            constant["COLUMNS"] = ordered_gemm.GATHERED_COLUMNS
            yield Configuration(f"gather_rows {target}", ordered_gemm.gather_rows_kernel, target, types, constant, {})
        for row, (k, order) in itertools.product(persistent, ((7168, None), (256, index))):
            types = {"x_ptr": _fp8(target), "x_s_ptr": scale, "w_ptr": _fp8(target), "w_s_ptr": scale}
            types |= {"out_ptr": "*bf16", "tiles_ptr": index} | ({"order_ptr": order} if order else {})
            types |= dict.fromkeys(("m_tiles", "R", "E", "N", "K"), "i32")
            constant = {} if order else {"order_ptr": None}
            constant |= row.for_channels(k).constexprs()
            name, kernel = f"grouped_w8a8 {target} {row} K={k}", ordered_gemm.grouped_persistent_kernel
            yield Configuration(name, kernel, target, types, constant, row.options())


def of_moe() -> Iterator[Configuration]:
    """The weighted sum for V3's sizes on each architecture."""
    scale, plain = "*fp32", "*bf16"
    for target in tiles.GROUPED_PLAIN:
        types = {"y_ptr": plain, "weights_ptr": scale, "ids_ptr": "*i64", "shared_ptr": plain, "out_ptr": plain}
        types |= {"H": "i32", "first": "i32", "n_local": "i32"}
        constant = {"TOP_K": 8, "BLOCK_H": moe.COMBINE_COLUMNS}
        yield Configuration(f"combine {target}", moe.combine_kernel, target, types, constant, pdl.options(target))


def of_sample() -> Iterator[Configuration]:
    """Rows without drafts, proposals that are kept, and drafts that are verified, on each architecture."""
    for target in sample.TILES:
        for name, drafts, keep in (("", False, False), (" kept", False, True), (" drafts", True, False)):
            pointers = {
                "logits_ptr": "*fp32", "choice_ptr": "*i64", "table_ptr": "*fp64",
                "drawn_from_ptr": "*fp32" if drafts else None, "found_ptr": "*i64", "q_ptr": "*fp32" if keep else None,
            }  # fmt: skip
            sizes = dict.fromkeys(("V", "stride", "choice_stride"), "i32")
            constexprs = {"DRAFTS": drafts, "KEEP": keep}
            tile, options = sample.sample_tile(target)
            yield of_target(target, f"sample{name}", sample.sample_kernel, pointers, sizes, (tile, options), constexprs)


PREFILL_ROWS = {"k_rows": "DN_PAD", "pe_rows": "R_PAD", "v_rows": "DV_PAD"}  # descriptors and their boxes' widths


def of_attention() -> Iterator[Configuration]:
    """Every kernel as it is compiled for V3's dimensions, with all heads and with those of one rank of eight; decode and
    prefill for the heads of GLM-4.7-Flash and prefill for GigaChat3's too, whose values are wider."""
    dims = {"C": 512, "R": 64, "C_PAD": 512, "R_PAD": 64, "PAGE": 64}
    queries = {"q_ptr": "*bf16", "q_pe_ptr": "*bf16", "positions_ptr": "*i64", "scale": "fp32"}
    slab = {"lengths_ptr": "*i32", "ends_ptr": "*i32", "slab": "i32", "n_slab": "i32"}
    for (target, packed), table in attention_tiles.DECODE.items():
        native = "*fp8e4nv" if converts_fp8(torch.float8_e4m3fn, target) else "*u8"
        pool = {"latents_ptr": native, "scales_ptr": "*fp32"} if packed else {"latents_ptr": "*bf16"}
        pool |= {"pages_ptr": "*i32", "P": "i32"}
        none = {} if packed else {"scales_ptr": None}
        kind = f"{target} {'fp8' if packed else 'bf16'}"
        for n_heads, tile in itertools.product((16, 20, 128), table):
            if tile.max_rows < n_heads:
                continue
            tables = {"k_pe_ptr": "*bf16", "out_ptr": "*fp32", "lse_ptr": "*fp32", "parts_ptr": "*i32"}
            tables |= dict.fromkeys(("bounds_ptr", "runs_ptr", "segments_ptr"), "*i32")
            tables |= dict.fromkeys(("first", "last", "width"), "i32")
            shared = {"N": n_heads, "LANES": triton.cdiv(n_heads, tile.rows)}
            name = f"decode {kind} {n_heads} heads {tile.rows}x{tile.keys}"
            if tile.by_group:
                yield Configuration(
                    f"{name} by group",
                    decode_fp8.decode_fp8_kernel,
                    target,
                    queries | pool | tables,
                    {n: dims[n] for n in ("C", "R", "R_PAD", "PAGE")}
                    | shared
                    | {"ROWS": tile.rows, "BLOCK": BLOCK_SIZE},
                    tile.options() | pdl.options(target),
                )
                continue
            plain = not tile.descriptor or tile is table[-1]  # the last one serves the batch-invariant mode too
            for descriptor in (True,) * tile.descriptor + (False,) * plain:
                page_rows = {"page_rows": "tensordesc<bf16[1, 64, 512]>"} if descriptor else {}
                yield Configuration(
                    f"{name}{' descriptor' * descriptor}",
                    decode.decode_kernel,
                    target,
                    queries | pool | tables | page_rows,
                    none
                    | ({} if descriptor else {"page_rows": None})
                    | dims
                    | shared
                    | {"SWAP": tile.swap}
                    | tile.constexprs(),
                    tile.options() | pdl.options(target),
                )
        yield Configuration(
            f"gather {kind}",
            prefill.gather_kernel,
            target,
            pool | slab | {"k_pe_in_ptr": "*bf16", "c_kv_ptr": "*bf16", "k_pe_ptr": "*bf16"},
            none | dims | {"KEYS": prefill.GATHERED},
            {"num_warps": prefill.GATHER_WARPS},
        )
    for (target, wide), table in attention_tiles.PREFILL.items():
        shapes = ((32, 128, 192), (20, 192, 256)) if wide else ((16, 128, 128), (128, 128, 128))
        for (n_heads, dn, dv), tile in itertools.product(shapes, table):
            padded = {"DN_PAD": triton.next_power_of_2(dn), "R_PAD": 64, "DV_PAD": triton.next_power_of_2(dv)}
            rows = {name: f"tensordesc<bf16[{tile.keys}, {padded[width]}]>" for name, width in PREFILL_ROWS.items()}
            yield Configuration(
                f"prefill {target} {n_heads} heads {f'of {dv} ' * wide}{tile.rows}x{tile.keys}",
                prefill.prefill_kernel,
                target,
                queries
                | slab
                | {"bounds_ptr": "*i32"}
                | dict.fromkeys(("k_ptr", "k_pe_ptr", "v_ptr", "out_ptr"), "*bf16")
                | {"state_ptr": "*fp32", "lse_ptr": "*fp32"}
                | (rows if tile.descriptor else {}),
                {"DN": dn, "R": 64, "DV": dv, "N": n_heads, "Q_TOKEN": n_heads * (dn + 64), "Q_HEAD": dn + 64}
                | padded
                | ({} if tile.descriptor else dict.fromkeys(rows))
                | tile.constexprs(),
                tile.options(),
            )
    for target in tiles.W8A16:
        numbers = ("n_runs", "first", "last", "fixed_pages", "N", "ROWS", "PAGE")
        yield Configuration(
            f"plan_runs {target}",
            decode_runs.plan_runs_kernel,
            target,
            dict.fromkeys(("lengths_ptr", "bounds_ptr", "runs_ptr", "segments_ptr"), "*i32")
            | dict.fromkeys(numbers, "i32"),
            {},
            {"num_warps": 1} | pdl.options(target),
        )
        for n_heads in (16, 128):
            yield Configuration(
                f"combine_parts {target} {n_heads} heads",
                decode_runs.combine_parts_kernel,
                target,
                {"partial_ptr": "*fp32", "lse_ptr": "*fp32", "parts_ptr": "*i32", "out_ptr": "*bf16"}
                | {"first": "i32", "stride": "i32"},
                {"N": n_heads, "C": 512, "COLUMNS": decode.COLUMNS, "PARTS": decode.PARTS},
                {"num_warps": decode.COMBINE_WARPS} | pdl.options(target),
            )


OF_MODULE = {
    quantisation: of_quantisation, gemm: of_gemm, fused: of_fused,
    norm_latents: of_norm_latents, around_attention: of_around_attention, router: of_router, sort: of_sort, grouped_gemm: of_grouped_gemm,
    ordered_gemm: of_ordered_gemm, moe: of_moe, sample: of_sample, attention: of_attention,
}  # fmt: skip


def configurations(*modules: ModuleType) -> Iterator[Configuration]:
    """What some modules' launches ask for, or all of them."""
    for module in modules or OF_MODULE:
        yield from OF_MODULE[module]()
