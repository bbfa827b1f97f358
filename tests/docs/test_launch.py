"""docs/launch.md: its commands parse and dry-run, its tables name the engines and machines there are."""

import re
import shlex

from dyncomp.cli.main import main
from dyncomp.launch import ENGINES
from dyncomp.launch.machine import GPUS, TPUS


def test_the_commands_dry_run(document, capsys):
    _, blocks = document("docs/launch.md")
    lines = [
        line for language, _, body in blocks if language == "bash" for line in body.split("\n")
    ]
    launches = [line for line in lines if re.match(r"dyncomp (launch|sweep) ", line)]
    assert len(launches) >= 3
    for line in launches:
        words = shlex.split(line)[1:]
        assert main([*words, *([] if "--dry-run" in words else ["--dry-run"])]) == 0, line
    assert "#SBATCH --array=0-5%4" in capsys.readouterr().out


def test_the_tables_name_all(document):
    text, _ = document("docs/launch.md")
    assert re.findall(r"^\| `(\w+)` \| [^|]+\| `", text, re.M) == list(ENGINES)
    named = set(re.findall(r"`(\w+)(?::\w+)?`", text))
    assert {*GPUS, *TPUS, "cpu"} <= named
