"""The tables of docs/kernels.md, which tables.py writes.

Times: one line for each op, latent, dtype and kernel backend, at the largest batch and the fewest steps of its file. It
shows the forward pass, or forward and backward together where a file has no forward pass alone. A file of train_step.py
gives one sentence a row. Counts: what step_traffic.py and compiled_traffic.py have left in docs/.
"""

import json
from pathlib import Path

KERNELS = ("cuda", "triton", "cpu")
EMPTY = (
    "No results are committed yet: `flowbp bench --json benchmarks/results/NAME.json` makes them, "
    "`python benchmarks/tables.py` this table."
)
LEGEND = (
    "`eager takes`, `torch.compile takes`: times the kernel's median. "
    "`of copy`: share of the bandwidth of a copy in the same rounds."
)
HEADER = (
    "| op | latent, batch, steps, dtype | kernel | median ms [20 %, 80 %] | eager takes | torch.compile takes | GB/s | "
    "of copy |\n"
    "|---|---|---|---|---|---|---|---|"
)


# -- counts ------------------------------------------------------------------------------------------------------------

SHARES = ("sd3.5-medium", "flux.1-dev")  # of which the shares are shown
NETWORKS = {"plain": "diffusers", "lora": "diffusers, peft's LoRA", "fused": "`apply`", "fused lora": "`apply`, LoRA"}
LINES = {  # of the shares, with the beginnings of the names that ops have in a count
    "GEMMs, convolutions": ("mm", "addmm", "bmm", "baddbmm", "convolution"),
    "attention": ("step_traffic::attention",),
    "`modulated_layer_norm`, `modulated_rms_norm`, `gated_residual`, `gated_residual_layer_norm`": (
        "flowbp_kernels::modulation",
    ),
    "`qk_norm`": ("flowbp_kernels::qk_norm",),
    "`swiglu`, `gelu`": ("flowbp_kernels::swiglu", "flowbp_kernels::gelu"),
    "`lora_linear`: its GEMMs, casts and sums": ("flowbp_kernels::lora_linear",),
    "`cfg_multistep_step`, `bridge_cotangents`, `leap_residuals`": (
        "flowbp_kernels::cfg_multistep_step",
        "flowbp_kernels::bridge_cotangents",
        "flowbp_kernels::leap_residuals",
    ),
    "PyTorch's other ops": ("",),
}


def traffic(report: dict) -> str:
    """Launches and gigabytes by network and pass."""
    lines = [
        f"| network, part | TFLOP (attention) | {' | '.join(NETWORKS.values())} |",
        f"|{'---|' * (len(NETWORKS) + 2)}",
    ]
    for backbone in dict.fromkeys(row["backbone"] for row in report["rows"]):
        rows = {row["network"]: row for row in report["rows"] if row["backbone"] == backbone}
        for part in ("pass", "replay", "step"):
            of_all = rows["plain"][part]
            flops = f"{of_all['gemm_tflop'] + of_all['attention_tflop']:,.0f} ({of_all['attention_tflop']:,.0f})"
            found = (rows[network][part] for network in NETWORKS)
            cells = (f"{of['launches']:,}; {of['gb_outside']:,.0f} GB" for of in found)
            lines.append(f"| `{backbone}`, {part} | {flops} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shares(report: dict) -> str:
    """The share of each op in the launches and in all bytes of a step with LoRA."""
    rows = [row for row in report["rows"] if row["network"] in ("lora", "fused lora") and row["backbone"] in SHARES]
    heads = (f"`{row['backbone']}`, {NETWORKS[row['network']]}" for row in rows)
    lines = [f"| of the launches; of the bytes | {' | '.join(heads)} |", f"|{'---|' * (len(rows) + 1)}"]
    found = [_by_line(row["ops"]) for row in rows]
    for line in LINES:
        cells = ("; ".join(f"{100 * share:.2g} %" for share in of[line] if share) for of in found)
        lines.append(f"| {line} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _by_line(ops: dict[str, dict]) -> dict[str, tuple[float, float]]:
    """(share of the launches, share of the bytes) of each line."""
    sums = {line: [0.0, 0.0] for line in LINES}
    for op, tally in ops.items():
        line = next(line for line, names in LINES.items() if op.startswith(tuple(names)))
        sums[line][0] += tally["launches"]
        sums[line][1] += tally["gb"]
    launches, gb = map(sum, zip(*sums.values(), strict=True))
    return {line: (part[0] / launches, part[1] / gb) for line, part in sums.items()}


def compiled(report: dict) -> str:
    """Launches and gigabytes of a block by what runs it."""
    kinds = ("eager", "compile", "fused")
    lines = ["| block, weights, part | diffusers | torch.compile | `apply` |", "|---|---|---|---|"]
    for key in dict.fromkeys((row["backbone"], row["block"], row["weights"]) for row in report["rows"]):
        rows = {row["runs"]: row for row in report["rows"] if (row["backbone"], row["block"], row["weights"]) == key}
        for part in ("pass", "replay"):
            found = (rows[kind][part] for kind in kinds)
            cells = (f"{of['launches']}; {of['gb_outside']:.3g} + {of['gb_gemm']:.3g} GB" for of in found)
            weights = "LoRA" if key[2] == "lora" else "all weights"
            lines.append(f"| `{key[0]}`, `{key[1]}`, {weights}, {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


# -- times -------------------------------------------------------------------------------------------------------------


def table(files: list[Path]) -> str:
    """Markdown for result files, in the order given: for each, the machine and its table."""
    parts = []
    for file in files:
        report = json.loads(file.read_text(encoding="utf-8"))
        if "options" in report:  # of train_step.py
            lines = [_train_step(report["options"], row) for row in report["rows"]]
        else:
            lines = [HEADER, *_lines(report["rows"])]
        parts.append(_machine(report["machine"]) + "\n\n" + "\n".join(lines))
    return "\n\n".join((LEGEND, *parts)) if parts else EMPTY


def _machine(machine: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    where = f"{machine['device']}, {machine['threads']} thread(s)" if machine["threads"] else machine["device"]
    return f"{where}; {versions}; commit {machine['commit']}, {machine['date']}."


def _train_step(options: dict, row: dict) -> str:
    nodes = f" (K = {row['active']})" if row["active"] else ""
    checkpointed = (", checkpointed" if row["checkpointing"] else "") + (", `apply`" if row.get("apply") else "")
    checkpointed += ", offload" if row.get("offload") else ""
    if "out_of_memory" in row:
        result = f"out of memory in {row['out_of_memory']}"
    else:
        result = f"{row['step_seconds']:.3g} s a step, {max(row['peak_mb'].values()) / 1e3:.3g} GB at most"
    case = f"`{row['backbone']}` ({row['tuning']}{checkpointed}; {options['steps']} steps, batch {options['batch']})"
    return f"- {case}, {row['method']}{nodes}, {row['mode']}: {result}."


def _lines(rows: list[dict]) -> list[str]:
    modes = {row["mode"] for row in rows}
    rows = [row for row in rows if row["mode"] == ("forward" if "forward" in modes else "full")]
    lines = []
    for key in sorted({_key(row) for row in rows}):
        cell = [row for row in rows if _key(row) == key]
        batch, steps = max(row["batch"] for row in cell), min(row["steps"] for row in cell)
        cell = {row["provider"]: row for row in cell if (row["batch"], row["steps"]) == (batch, steps)}
        lines += [_line(cell, provider) for provider in KERNELS if provider in cell]
    return lines


def _key(row: dict) -> tuple[str, str, str]:
    return row["op"], row["latent"], row["dtype"]


def _line(cell: dict[str, dict], provider: str) -> str:
    row = cell[provider]
    ms = row["milliseconds"]
    times = [
        f"{cell[other]['milliseconds']['median'] / ms['median']:.1f} x" if other in cell else "not measured"
        for other in ("eager", "compile")
    ]
    case = f"{row['latent']}, {row['batch']}, {row['steps']}, {row['dtype']}"
    figures = (
        f"{ms['median']:.3g} [{ms['p20']:.3g}, {ms['p80']:.3g}]",
        *times,
        f"{row['gb_per_second']:.3g}",
        f"{row['percent_of_copy']:.0f} %",
    )
    op = f"`{row['op']}`" + (", forward and backward" if row["mode"] == "full" else "")
    return f"| {op} | {case} | {provider} | {' | '.join(figures)} |"
