from __future__ import annotations

import pytest

from grood_cert.errors import InputError
from grood_cert.runs.shards import WHOLE, Shard, shard_of_environment


@pytest.mark.parametrize("text", ["", "1", "0/4", "5/4", "1/0", "-1/4", "1/4/2", "a/b", "1.0/4"])
def test_shards_are_read_strictly(text):
    with pytest.raises(InputError, match="expected i/n with i from 1 to n"):
        Shard.parse(text)


def test_the_shard_of_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert shard_of_environment() == WHOLE
    for name, value in (("RANK", "2"), ("WORLD_SIZE", "3"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert shard_of_environment() == Shard(2, 3, joint=True)
    assert not shard_of_environment().leads and Shard(2, 3).leads and Shard(0, 3, joint=True).leads
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(InputError, match="RANK=3 and WORLD_SIZE=3"):
        shard_of_environment()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert shard_of_environment() == WHOLE
