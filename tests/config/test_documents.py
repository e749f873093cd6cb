"""From text to values: what YAML means to kube-proxy's reader, and that no text is too broken to be told about."""

import random
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kproxy.config.defaults import defaulted
from kproxy.config.documents import parse
from kproxy.config.duration import Duration
from kproxy.config.errors import ConfigError
from kproxy.config.files import config_yaml
from kproxy.config.v1alpha1 import Configuration, KproxyConfiguration, VModuleItem, replaced, value_at
from tests.config.conftest import HEAD, OWN_HEAD

KUBEADM = (Path(__file__).parent / "kubeadm.conf").read_text()


def seconds(number):
    return Duration(number * 10**9)


def test_what_is_wrong_is_told_with_its_field_and_not_in_pythons_words(problems_of):
    digits = "1" * 5000
    assert problems_of(
        HEAD
        + f"""
bindAddressHardFail: !!bool foo
hostnameOverride: !!int foo
portRange: !!timestamp 2020-01-01
conntrack: {{min: {digits}, udpTimeout: {digits}s, maxPerCore: !!int ""}}
iptables: &loop {{minSyncPeriod: *loop}}
nodePortAddresses: [10.0.0.0/8, 7]
mode: [[ipvs]]
clientConnection: {{? [burst] : 1}}
metricsBindAddress: 127.0.0.1:{digits}
"""
    ) == [
        'bindAddressHardFail: "foo" is not a !!bool',
        'hostnameOverride: "foo" is not a !!int',
        "portRange: cannot be a !!timestamp",
        'conntrack.maxPerCore: "" is not a !!int',
        "iptables.minSyncPeriod: contains itself",
        "clientConnection: has a field whose name is not text",
        "conntrack.min: expected int, got float",
        f'conntrack.udpTimeout: "{digits}s" is longer than 292 years',
        "nodePortAddresses[1]: expected str, got int",
        "mode: a list is not one of iptables, ipvs, nftables",
        f'metricsBindAddress: "{digits}" in "127.0.0.1:{digits}" is not a port from 1 to 65535',
    ]


UNPARSABLE = [
    ('clusterCIDR: "\x01"\n', "is not YAML: line 3 has the character #x01"),
    ("\x00", "is not YAML: line 3 has the character #x00"),
    ("mode: " + "[" * 3000, "is nested too deeply"),
    ('hostnameOverride: "\\Uffffffff"\n', "is not YAML: line 3 cannot be read"),
]


@pytest.mark.parametrize(("text", "problem"), UNPARSABLE, ids=[problem for _, problem in UNPARSABLE])
def test_no_text_is_too_broken_to_be_told_about(problems_of, text, problem):
    assert problems_of(HEAD + text) == [problem]


def test_json_that_is_nested_too_deeply_is_told_about(problems_of):
    assert problems_of('{"a":' * 5000) == ["is nested too deeply"]


def test_what_makes_no_sense_in_kproxys_own_document_is_told_as_its_own(read, problems_of):
    warnings = read(HEAD + OWN_HEAD + "metrics: on\nmanifests: /a\nmanifests: /b\n").warnings

    assert [warning.partition(": ")[2] for warning in warnings] == [
        "KproxyConfiguration: manifests: set twice; the last one, in line 8, counts",
        "KproxyConfiguration: metrics: unknown field; ignored",
    ]
    assert problems_of(HEAD + OWN_HEAD + "manifests: !!bool a\n") == [
        'KproxyConfiguration: manifests: "a" is not a !!bool'
    ]


def test_an_unknown_field_in_a_list_is_ignored_with_a_warning(read):
    config, _, warnings = read(HEAD + "logging: {format: text, vmodule: [{filePattern: a, verbosity: 1, level: 2}]}\n")

    assert config.logging.vmodule == (VModuleItem(file_pattern="a", verbosity=1),)
    assert warnings[0].endswith("logging.vmodule[0].level: unknown field; ignored")


def test_a_blank_host_name_is_no_host_name(problems_of):
    assert problems_of(HEAD + "hostnameOverride: '   '\n") == ["hostnameOverride: is blank"]


# what is written, and what kube-proxy's reader (sigs.k8s.io/yaml) makes of it
SCALARS = [
    ("clientConnection.qps", "1e3", 1000.0),
    ("clientConnection.qps", "1_000.5", 1000.5),
    ("clientConnection.burst", "2e1", 20),
    ("clientConnection.burst", "0x10", 16),
    ("clientConnection.burst", "010", 8),
    ("clientConnection.burst", "0o10", 8),
    ("clientConnection.burst", "+0b11", 3),
    ("enableProfiling", "y", True),
    ("enableProfiling", "Off", False),
    ("hostnameOverride", "1:30", "1:30"),
    ("hostnameOverride", "2020-01-31", "2020-01-31"),
    ("hostnameOverride", "2020-13-45", "2020-13-45"),
    ("hostnameOverride", "'y'", "y"),
    ("hostnameOverride", "!!str 1e3", "1e3"),
]


@pytest.mark.parametrize(("field", "written", "meant"), SCALARS, ids=str)
def test_a_scalar_means_what_it_means_to_kube_proxy(read, field, written, meant):
    *section, name = field.split(".")
    text = f"{name}: {written}\n"
    config, settings, _ = read(HEAD + (f"{section[0]}:\n  {text}" if section else text))

    assert value_at(config, field) == meant
    assert value_at(read(config_yaml(config, settings)).configuration, field) == meant


def test_a_number_to_the_base_60_is_none(problems_of):
    assert problems_of(HEAD + "clientConnection: {burst: 1:30}\n") == ["clientConnection.burst: expected int, got str"]


def test_anchors_and_merged_fields_are_followed(read):
    config, _, warnings = read(
        HEAD + "iptables: &periods {syncPeriod: 50s, minSyncPeriod: 5s}\n"
        "nftables: {<<: *periods, minSyncPeriod: 6s}\nipvs: *periods\n"
    )

    assert warnings == ()
    assert (config.nftables.sync_period, config.nftables.min_sync_period) == (seconds(50), seconds(6))
    assert (config.ipvs.sync_period, config.ipvs.min_sync_period) == (seconds(50), seconds(5))


@given(st.text(alphabet="yYnNoOfFtrue018:_.,-+x~<=*&!#'\"{[ é", min_size=1))
def test_text_is_written_so_that_it_stays_text(text):
    written = config_yaml(replaced(defaulted(Configuration()), "portRange", text), KproxyConfiguration())

    (document,) = parse(written)

    assert document.value["portRange"] == text


PIECES = [
    *"\0\x01[]{}:&*!|>%@'\"\\,-?#~<= \t\n",
    "!!int ",
    "!!set ",
    "!<",
    "&a ",
    "*a ",
    "<<: ",
    "%YAML 1.",
    "\\U",
    "1" * 5000,
]


@pytest.mark.parametrize("seed", range(50))
def test_a_damaged_file_is_read_or_refused_and_nothing_else(read, seed):
    luck = random.Random(seed)
    text = list(KUBEADM)
    for _ in range(luck.randint(1, 4)):
        text.insert(luck.randrange(len(text)), luck.choice(PIECES))
    with suppress(ConfigError):
        read("".join(text))
