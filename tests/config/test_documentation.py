"""docs/configuration.md knows every flag, field and feature gate, with its default."""

import json
import re
from pathlib import Path

import pytest

from kproxy.cli.flags import FLAGS
from kproxy.cli.help import default_text
from kproxy.config.defaults import defaulted
from kproxy.config.feature_gates import FEATURE_GATES
from kproxy.config.v1alpha1 import Configuration, KproxyConfiguration, paths, to_kproxy_v1alpha1, to_v1alpha1

DOCUMENT = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
ROWS = [line.split(" | ") for line in DOCUMENT.splitlines() if line.startswith("| `")]
FLAG_ROWS = {match[1]: row for row in ROWS if (match := re.match(r"\| `--([a-z-]+)", row[0]))}
OTHER_ROWS = {match[1]: row for row in ROWS if (match := re.match(r"\| `([A-Za-z.]+)`", row[0]))}


def test_no_flag_is_documented_that_does_not_exist():
    assert FLAG_ROWS.keys() == {flag.name for flag in FLAGS}


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_a_flag_is_documented_with_its_default_and_its_fields(flag):
    _, default, beside_config, sets, meaning = FLAG_ROWS[flag.name]

    assert default.strip("` ") == default_text(flag).removeprefix(" (default ").removesuffix(")")
    assert beside_config.strip() == ("yes" if flag.with_config else "")
    assert re.findall("`([^`]+)`", sets) == [*flag.fields, *([flag.own_field] if flag.own_field else [])]
    assert meaning


@pytest.mark.parametrize(
    ("field", "document"),
    [(field, to_v1alpha1(defaulted(Configuration()))) for field in paths(Configuration())]
    + [(field, to_kproxy_v1alpha1(KproxyConfiguration())) for field in paths(KproxyConfiguration())],
)
def test_a_field_is_documented_with_its_default(field, document):
    value = document
    for name in field.split("."):
        value = value.get(name)  # absent: empty, and written only if it is not

    shown = OTHER_ROWS[field][1].strip("` ")
    assert shown in {value, json.dumps(value)} or (value is None and shown in {"{}", "[]", "false"})


@pytest.mark.parametrize("name", FEATURE_GATES)
def test_a_feature_gate_is_documented_with_its_default(name):
    gate = FEATURE_GATES[name]

    assert OTHER_ROWS[name][1] == f"`{json.dumps(gate.default)}`" + (", locked" if gate.locked else "")
