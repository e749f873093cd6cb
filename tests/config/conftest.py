"""Configuration files: the text goes into a file, and out comes what it means or what is wrong with it."""

import pytest

from kproxy.config.errors import ConfigError
from kproxy.config.files import read_config_file

HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
OWN_HEAD = "---\napiVersion: kproxy.dev/v1alpha1\nkind: KproxyConfiguration\n"


@pytest.fixture
def read(tmp_path):
    """Read a configuration file with this text."""

    def read_text(text):
        path = tmp_path / "config.conf"
        path.write_text(text)
        return read_config_file(path)

    return read_text


@pytest.fixture
def problems_of(read, tmp_path):
    """What is said about a file that cannot be used, without the file's name in front."""

    def problems(text):
        with pytest.raises(ConfigError) as error:
            read(text)
        prefix = f"{tmp_path / 'config.conf'}: "
        assert all(problem.startswith(prefix) for problem in error.value.problems)
        return [problem.removeprefix(prefix) for problem in error.value.problems]

    return problems
