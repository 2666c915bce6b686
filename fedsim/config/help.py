"""The text of `--help`: how to start, and every key of the tree."""

import shutil
import textwrap

from fedsim.config.keys import Key, Section, sections, show

USAGE = """\
fedsim: federated LoRA fine-tuning of language models, simulated on one node or many

usage: python -m fedsim.main [CONFIG.yaml] [KEY=VALUE ...] [--dry-run] [--version] [--help]
       torchrun --nproc_per_node N -m fedsim.main [the same]
       python -m fedsim.main [the same] --estimate [--probe] [--gpu NAME] [--processes N] [--json FILE]

  CONFIG.yaml  a file with some of the keys below; without one, the embedded quick start runs
  KEY=VALUE    sets a key; wins over the file. The value is YAML: 4, 1e-3, true, null, text, [a, b]
  --dry-run    print the resolved configuration and what it would cost, and stop
  --estimate   print what the run would cost: memory, work, bytes, seconds; without weights, and stop
  --probe      with --estimate: load the base and measure a few steps here; nothing is written to the run folder
  --gpu        with --estimate: plan for this GPU by its data sheet, such as H100, A100-80 or RTX4090
  --processes  with --estimate: plan for so many processes; else for those that are started
  --json       with --estimate: write the figures to FILE as well
  --version    print the version, and stop
  -h, --help   print this text, and stop

examples:
  python -m fedsim.main
  torchrun --nproc_per_node 4 -m fedsim.main run.rounds=20 data.partition.dirichlet_alpha=0.1
  python -m fedsim.main configs/quickstart.yaml lora.rank=8 'lora.target_modules=[q_proj, k_proj, v_proj]'

A run writes to run.output_dir/run.name; the same command again goes on where it stopped.
A value may refer to others: ${lora.rank}, ${oc.env:HOME}.
"""
NARROWEST, WIDEST = 40, 110


def help_text(width: int | None = None) -> str:
    """The whole help, ending in a newline.

    Args:
        width: columns; None asks the terminal.
    """
    columns = shutil.get_terminal_size().columns if width is None else width
    columns = min(max(columns, NARROWEST), WIDEST)
    blocks = [_wrap_usage(columns)]
    blocks += [_section_text(section, columns) for section in sections() if section.keys]
    return "\n".join(blocks)


def _wrap_usage(columns: int) -> str:
    lines = [_wrap(line, columns, rest="      " if line[:1] == " " else "") for line in USAGE.splitlines()]
    return "\n".join(lines) + "\n"


def _section_text(section: Section, columns: int) -> str:
    title = _wrap(f"{section.name}: {section.meaning}", columns, rest="  ")
    return "\n".join([title, *(_key_text(key, columns) for key in section.keys)]) + "\n"


def _key_text(key: Key, columns: int) -> str:
    rule = key.rule.removeprefix("a ").removeprefix("an ")
    unit = f"; unit: {key.unit}" if key.unit else ""
    head = _wrap(f"{key.name}  ({rule}; default {_as_yaml(key.default)}{unit})", columns, "  ", "      ")
    return f"{head}\n{_wrap(key.meaning, columns, '      ', '      ')}"


def _wrap(text: str, columns: int, first: str = "", rest: str = "") -> str:
    return textwrap.fill(
        text,
        columns,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _as_yaml(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_as_yaml(item) for item in value)}]"
    return value if isinstance(value, str) else show(value)
