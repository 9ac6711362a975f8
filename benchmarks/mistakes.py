"""What each command answers to a mistake, and the CPU seconds that it takes to answer.

    python benchmarks/mistakes.py [--only train] [--json docs/mistakes.json]

Every mistake is a command of its own, run in a folder with a few files to be wrong about. A good answer comes within
LIMIT seconds, before torch and the libraries of models are imported, names what is wrong in one line, and shows neither
a traceback nor a raw "[Errno". The script exits with code 1 if any answer is not good.
An answer that needs torch waits for its import, which is measured beside them: busy neighbours slow both.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 2.0  # CPU seconds
FILES = {
    "broken.yaml": "output: [\n",
    "list.yaml": "- a\n- b\n",
    "twice.yaml": "output: a\nsteps: 3\nsteps: 4\n",
    "octal.yaml": "output: a\nsteps: 0300\n",
    "empty.txt": "\n\n",
    "bad.jsonl": '{"file_name": "0001.png"}\n',
    "open.csv": 'prompt\n"a cat\n',
    "picture.png": "",
    "file": "",
    "own/thesis.txt": "mine",
    "own.py": "def reward(images, prompts):\n    return images.mean((1, 2, 3))\n\nnumber = 3\n",
    "lr=1e-4/keep": "",
}
MISTAKES = """
evl
train
train dmo
train nowhere.yaml
train runs/typo --resume
train broken.yaml
train list.yaml
train twice.yaml
train octal.yaml
train own
train demo steps
train demo stps=3
train demo lr=1e-4
train demo steps=-1
train demo steps=many
train demo seed=1.5
train demo data.batch_size=0
train demo optimizer.lr=nan
train demo rollout.height=33
train demo method=lepalign
train demo method.alpa=0.3
train demo method=own:Method
train demo method=own:number
train demo method=drtune rollout.num_steps=1
train demo reward.name=hpsv
train demo reward.name=shapes
train demo reward=mymod:f
train demo reward=own:rewrad
train demo reward=own:number
train demo reward.name=pickscore reward.model=own
train demo backbone.name=shape
train demo backbone.name=own
train demo backbone.name=nobody/nothing
train demo data.prompts=nowhere.txt
train demo data.prompts=picture.png
train demo data.prompts=empty.txt
train demo data.prompts=bad.jsonl
train demo data.prompts=open.csv
train demo data.prompts=shapes:trian
train demo evaluation.prompts=nowhere.txt
train demo evaluation.every=5 evaluation.validation_prompts=nowhere.txt
train demo evaluation.best=monitor
train demo evaluation.every=5 evaluation.best=fid
train demo evaluation.monitors.other.name=hpsv
train demo evaluation.checker=shape
train demo evaluation.checker=own:chekcer
train demo evaluation.checker='{detector: nowhere, colours: nowhere}'
train demo tuning.mode=full tuning.targets=[attn.to_q]
train demo optimizer.name=adam
train demo optimizer.name=adamw8bit
train demo compile=inductr
train demo output=file
train demo output=own
train demo output=run
train demo output=/proc/flowbp
train demo --resume --overwrite
train run --resume optimizer.lr=1e-3
train demo output='~no-such-user/run'
train demo --processes 0
train demo --overwite
train sd3.5-medium/flowbp-lagrange
sample demo
sample dmo "a cat"
sample demo "a cat" --out nodir/x.png
sample demo "a cat" --out plain
sample demo "a cat" --out x.yaml
sample demo "a cat" --seed -1
sample demo "a cat" --weights nowhere
sample demo "a cat" --weights own
eval nowhere
eval demo evaluation=null
eval demo --weights nowhere
eval demo --weights own
eval demo --weights a/b=run
eval run --weights base=run
eval demo --out own
eval demo --out file
eval lr=1e-4
compare run
compare run run
compare run nowhere
compare run own
compare run run2 --out own
compare run run2 --out file
export nowhere x.safetensors
export run x.safetensors
export lora nodir/x.safetensors
export lora own
export lora x.pt
estimate dmo
estimate demo --gpu-memory 24
estimate demo --gpu-memory plenty
estimate demo --json nodir/x.json
estimate demo backbone.name=nobody/nothing
plan lepalign
plan flowbp-lagrange alpa=0.3
plan flowbp-lagrange alpha=much
plan drtune --steps 1
plan own:Method
plan flowbp-lagrange --png nodir/x.png
plan flowbp-lagrange --png x.yaml
rewards hpsv
rewards shapes-monitr
rewards mymod:f
presets dmo
sweep demo seeds=a
sweep demo optimizer.lr=1e-4,-1
sweep demo seed=1,2
bench --op nothing
bench --json nodir/x.json
doctor extra
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the mistakes of which this is a part")
    parser.add_argument("--json", type=Path, help="write all answers here")
    options = parser.parse_args()
    rows, torch = [], [measured([sys.executable, "-c", "import torch"], ROOT)[0] for _ in range(5)]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for line in (line for line in MISTAKES.strip().splitlines() if options.only in line):
            rows.append(answer(line, Path(folder)))
            print(
                "{verdict:4} {code:3} {seconds:5.2f} s  flowbp {command}\n      {message}".format(**rows[-1]),
                flush=True,
            )
    seconds, bad = [row["seconds"] for row in rows], [row for row in rows if row["verdict"] != "good"]
    figures = {
        "median": round(statistics.median(seconds), 2),
        "most": max(seconds),
        "limit": LIMIT,
        "import torch": statistics.median(torch),
    }
    print(f"{len(rows)} mistakes, {len(bad)} bad answers; CPU seconds: {figures}")
    if options.json:
        from flowbp_kernels.bench import machine

        report = {"machine": machine("cpu"), "cpu_seconds": figures, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.exit(bool(bad))


def prepare(folder: Path) -> None:
    """Files to be wrong about: FILES, two runs of one step, and a folder that is named as an override is."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    config = subprocess.run([*FLOWBP, "presets", "demo"], capture_output=True, text=True, env=environment(), check=True)
    for name in ("run", "run2", "lora"):
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_text(config.stdout.replace("runs/demo", name), encoding="utf-8")
        (folder / name / "metrics.jsonl").write_text('{"step": 1, "seconds": 1, "peak_mb": 1}\n', encoding="utf-8")
    (folder / "lora/pytorch_lora_weights.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


FLOWBP = [sys.executable, "-m", "flowbp"]


def environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return os.environ | own


def measured(command: list[str], folder: Path) -> tuple[float, subprocess.CompletedProcess]:
    """(CPU seconds of a command and its children, what it gave)."""
    began = os.times()
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
    ended = os.times()
    spent = ended.children_user + ended.children_system - began.children_user - began.children_system
    return round(spent, 2), done


def answer(line: str, folder: Path) -> dict[str, str | int | float]:
    """{"command", "code", "seconds" of CPU of the process and its children, "message": its first line, "verdict"}."""
    seconds, done = measured([*FLOWBP, *shlex.split(line)], folder)
    said = done.stderr.replace(str(folder), "FOLDER")
    lines = [text for text in (part.strip("│╭╮╰╯─ ") for part in said.splitlines()) if text]
    message = next((text for text in lines if text.startswith("error:")), lines[-1] if lines else "")
    raw = re.search(r"Traceback|\[Errno|site-packages", done.stderr)
    verdict = "code" if done.returncode != 2 else "raw" if raw else "slow" if seconds > LIMIT else "good"
    return {"command": line, "code": done.returncode, "seconds": seconds, "message": message, "verdict": verdict}


if __name__ == "__main__":
    main()
