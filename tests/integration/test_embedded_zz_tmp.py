import pytest
from tests.waiting import eventually
async def test_a(database_url, connection, kafka, topic):
    print(database_url, kafka.bootstrap, topic, await connection.fetch("select table_name from information_schema.tables where table_schema='public'"))
async def test_b(database_url, connection):
    n=0
    def c():
        nonlocal n; n+=1; return n>5
    assert await eventually(c)
    with pytest.raises(pytest.fail.Exception): await eventually(lambda: False, 0.1)
def test_c(database_url, topic): pass
async def test_d(restartable_kafka, restartable_postgres): pass
