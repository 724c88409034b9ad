"""Delivering webhooks from a real PostgreSQL to real HTTP servers on loopback, with a clock that is set by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from tests.conftest import Database
from tests.support.quota_webhooks import NOW, WebhookBench
from tests.support.receiver import SILENCE, Receiver, open_receiver
from tests.support.wait import until
from usameter_core.errors import FailedPrecondition, NotFound
from usameter_core.postgres.pool import open_pool
from usameter_core.tasks import background_tasks
from usameter_quota.clients import WebhookClient, open_webhook_client
from usameter_quota.domain.quota_events import QuotaEventType
from usameter_quota.domain.webhooks import ATTEMPTS_MAX, Attempt, DeliveryState, message_id, secret_text
from usameter_quota.service.webhook_delivery import KEPT_AFTER_CLOSING, LEASE
from usameter_quota.service.webhooks import ENDPOINTS_MAX, PREVIOUS_SECRET_KEPT
from usameter_quota.store.webhooks import WebhookDeliveryStore


@pytest.fixture
async def client() -> AsyncIterator[WebhookClient]:
    async with open_webhook_client(allow_private=True, timeout_seconds=60) as opened:
        yield opened


@pytest.fixture
async def bench(database: Database, client: WebhookClient) -> AsyncIterator[WebhookBench]:
    """In a database of its own: workers look at all organizations."""
    async with open_pool(database.role_url("quota"), application_name="test") as pool:
        yield WebhookBench(pool, client)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with open_receiver() as opened:
        yield opened


async def test_an_event_is_sent_once_signed_and_logged(bench: WebhookBench, receiver: Receiver) -> None:
    endpoint, secret = await bench.endpoint(receiver)
    await bench.happen()
    assert await bench.deliver() == 1
    (message,) = receiver.received
    assert message.path == "/hooks"
    assert message.headers["content-type"] == "application/json"
    assert message.headers["webhook-timestamp"] == str(int(NOW.timestamp()))
    assert message.id == message_id(endpoint.endpoint_id, 1)
    assert message.is_signed_with(secret)
    assert not message.is_signed_with(secret_text(b"x" * 32))
    assert (message.json["type"], message.json["data"]["position"]) == ("quota.limit_reached", 1)
    delivery = await bench.delivery(endpoint)
    assert (delivery.state, delivery.next_attempt_at) == (DeliveryState.DELIVERED, None)
    (attempt,) = delivery.attempts
    assert (attempt.attempted_at, attempt.status_code, attempt.error) == (NOW, 200, None)
    assert 0 <= attempt.duration_ms < 60_000
    bench.clock.advance(timedelta(days=2))
    assert await bench.deliver() == 0


async def test_an_endpoint_gets_events_of_its_types_since_it_was_made_and_of_its_organization(
    bench: WebhookBench, receiver: Receiver
) -> None:
    await bench.happen(3)
    await bench.endpoint(receiver, QuotaEventType.RESET, QuotaEventType.SOFT_LIMIT_REACHED)
    other = WebhookBench(bench.pool, bench.client)
    for each in (bench, other):
        for type in ("SOFT_LIMIT_REACHED", "LIMIT_REACHED", "RESET"):
            await each.happen(type=type)
    assert await bench.deliver() == 2
    got = sorted((message.json["data"]["position"], message.json["type"]) for message in receiver.received)
    assert got == [(4, "quota.soft_limit_reached"), (6, "quota.reset")]


@pytest.mark.parametrize("status", [300, 302, 404, 500])
async def test_what_is_not_2xx_is_tried_again_under_the_same_id(
    bench: WebhookBench, receiver: Receiver, status: int
) -> None:
    endpoint, secret = await bench.endpoint(receiver)
    receiver.answers.append(status)
    await bench.happen()
    assert await bench.deliver() == 1
    delivery = await bench.delivery(endpoint)
    assert delivery.state == DeliveryState.PENDING
    assert delivery.next_attempt_at is not None
    assert timedelta(seconds=7.5) <= delivery.next_attempt_at - NOW <= timedelta(seconds=12.5)
    bench.clock.set(delivery.next_attempt_at - timedelta(microseconds=1))
    assert await bench.deliver() == 0
    bench.clock.set(delivery.next_attempt_at)
    assert await bench.deliver() == 1
    first, second = receiver.received
    # A redirect is not followed.
    assert (first.path, second.path) == ("/hooks", "/hooks")
    assert (first.id, first.body) == (second.id, second.body)
    assert int(second.headers["webhook-timestamp"]) >= int(first.headers["webhook-timestamp"]) + 7
    assert second.is_signed_with(secret)
    assert "cookie" not in second.headers
    delivery = await bench.delivery(endpoint)
    assert delivery.state == DeliveryState.DELIVERED
    assert [attempt.status_code for attempt in delivery.attempts] == [status, 200]


async def test_2xx_is_success(bench: WebhookBench, receiver: Receiver) -> None:
    endpoint, _ = await bench.endpoint(receiver)
    receiver.answers.extend([200, 201, 204, 299])
    await bench.happen(4)
    await bench.deliver()
    assert {delivery.state for delivery in await bench.deliveries(endpoint)} == {DeliveryState.DELIVERED}


async def test_silence_and_refused_connections_are_tried_again(bench: WebhookBench, receiver: Receiver) -> None:
    endpoint, _ = await bench.endpoint(receiver)
    receiver.answers.append(SILENCE)
    await bench.happen()
    async with open_webhook_client(allow_private=True, timeout_seconds=0.2) as bench.client:
        assert await bench.deliver() == 1
    delivery = await bench.delivery(endpoint)
    assert delivery.attempts[0].error == "did not answer within 0.2 s"
    assert 200 <= delivery.attempts[0].duration_ms < 5_000

    port, receiver.port = receiver.port, 0
    async with open_receiver() as closed:
        pass
    await bench.pool.execute("UPDATE quota.webhook_endpoint SET url = $1", closed.url)
    bench.clock.advance(timedelta(minutes=1))
    async with open_webhook_client(allow_private=True) as bench.client:
        assert await bench.deliver() == 1
        delivery = await bench.delivery(endpoint)
        assert delivery.attempts[1].status_code is None
        assert "connect" in (delivery.attempts[1].error or "").lower()

        receiver.port = port
        await bench.pool.execute("UPDATE quota.webhook_endpoint SET url = $1", receiver.url)
        bench.clock.advance(timedelta(minutes=10))
        assert await bench.deliver() == 1
    assert (await bench.delivery(endpoint)).state == DeliveryState.DELIVERED


async def test_a_message_is_given_up_after_ten_attempts_in_a_day_or_so_and_stays_to_be_seen(
    bench: WebhookBench, receiver: Receiver
) -> None:
    endpoint, _ = await bench.endpoint(receiver)
    receiver.always = 500
    await bench.happen()
    for number in range(1, ATTEMPTS_MAX + 1):
        assert await bench.deliver() == 1
        delivery = await bench.delivery(endpoint)
        assert len(delivery.attempts) == number
        if number < ATTEMPTS_MAX:
            assert delivery.next_attempt_at is not None
            bench.clock.set(delivery.next_attempt_at)
    assert (delivery.state, delivery.next_attempt_at) == (DeliveryState.FAILED, None)
    assert timedelta(hours=18) < bench.clock.now() - NOW < timedelta(hours=36)
    bench.clock.advance(timedelta(days=2))
    assert await bench.deliver() == 0
    assert (await bench.delivery(endpoint)).state == DeliveryState.FAILED


async def test_410_disables_the_endpoint_and_gives_up_what_was_to_be_sent(
    bench: WebhookBench, receiver: Receiver
) -> None:
    endpoint, _ = await bench.endpoint(receiver)
    receiver.always = 500
    await bench.happen()
    await bench.deliver()
    receiver.answers.append(410)
    bench.clock.advance(timedelta(seconds=1))
    await bench.happen()
    assert await bench.deliver() == 1
    disabled = await bench.service.get_endpoint(bench.org_id, endpoint.endpoint_id)
    assert disabled.disabled_at == bench.clock.now()
    await bench.happen()
    bench.clock.advance(timedelta(days=1))
    async with bench.worker() as worker:
        await worker.deliver_due()
    assert len(receiver.received) == 2
    new, old = await bench.deliveries(endpoint)
    assert (new.state, [attempt.status_code for attempt in new.attempts]) == (DeliveryState.FAILED, [410])
    assert (old.state, [attempt.status_code for attempt in old.attempts]) == (DeliveryState.FAILED, [500])


async def test_two_workers_send_each_message_once(bench: WebhookBench, receiver: Receiver) -> None:
    endpoint, _ = await bench.endpoint(receiver)
    async with open_receiver() as second_receiver:
        await bench.endpoint(second_receiver)
        await bench.happen(100)
        async with background_tasks() as tasks:
            workers = [bench.worker_in(tasks) for _ in range(2)]

            async def delivered() -> bool:
                await asyncio.gather(*(worker.deliver_due() for worker in workers))
                count = "SELECT count(*) FROM quota.webhook_delivery WHERE state = 'DELIVERED'"
                return bool(await bench.pool.fetchval(count) == 200)

            await until(delivered, "all is delivered", seconds=30)
        for each in (receiver, second_receiver):
            assert len(each.received) == len({message.id for message in each.received}) == 100
    assert all(len(delivery.attempts) == 1 for delivery in await bench.deliveries(endpoint))


async def test_a_worker_leaves_what_another_has_in_its_hands_and_waits_for_nobody(
    bench: WebhookBench, receiver: Receiver
) -> None:
    await bench.endpoint(receiver)
    await bench.happen(2)
    store = WebhookDeliveryStore(bench.pool)
    async with bench.pool.acquire() as other, other.transaction():
        await other.execute("SELECT FROM quota.webhook_endpoint FOR UPDATE")
        assert not await asyncio.wait_for(store.add_deliveries(now=NOW, endpoints_max=9, events_max=9), 5)
    assert await store.add_deliveries(now=NOW, endpoints_max=9, events_max=9)
    async with bench.pool.acquire() as other, other.transaction():
        await other.execute("SELECT FROM quota.webhook_delivery WHERE position = 1 FOR UPDATE")
        claim = store.claim_deliveries(now=NOW, leased_until=NOW + LEASE, busy=[], endpoints_max=9, deliveries_max=9)
        assert [due.event.position for due in await asyncio.wait_for(claim, 5)] == [2]


async def test_an_endpoint_that_is_far_behind_catches_up_step_by_step(bench: WebhookBench, receiver: Receiver) -> None:
    endpoint, _ = await bench.endpoint(receiver)
    await bench.happen(5)
    store = WebhookDeliveryStore(bench.pool)
    for through in (2, 4, 5):
        assert await store.add_deliveries(now=NOW, endpoints_max=9, events_max=2)
        assert [delivery.position for delivery in await bench.deliveries(endpoint)] == list(range(through, 0, -1))
    assert not await store.add_deliveries(now=NOW, endpoints_max=9, events_max=2)


async def test_a_worker_killed_between_attempt_and_record_costs_a_second_message_and_loses_none(
    bench: WebhookBench, receiver: Receiver
) -> None:
    """At least once: the lease runs out, and the message is sent again under its id."""
    endpoint, _ = await bench.endpoint(receiver)
    receiver.answers.append(SILENCE)
    await bench.happen()
    async with bench.worker() as killed:
        await killed.deliver_due()
        await receiver.until_received(1)
    assert (await bench.delivery(endpoint)).attempts == ()
    bench.clock.advance(LEASE - timedelta(microseconds=1))
    assert await bench.deliver() == 0
    bench.clock.advance(timedelta(microseconds=1))
    assert await bench.deliver() == 1
    first, second = receiver.received
    assert first.id == second.id
    assert (await bench.delivery(endpoint)).state == DeliveryState.DELIVERED


async def test_an_answer_that_comes_after_the_lease_does_not_undo_a_success(
    bench: WebhookBench, receiver: Receiver
) -> None:
    endpoint, _ = await bench.endpoint(receiver)
    store = WebhookDeliveryStore(bench.pool)
    await bench.happen()
    await store.add_deliveries(now=NOW, endpoints_max=1, events_max=1)
    (late,) = await store.claim_deliveries(
        now=NOW, leased_until=NOW + LEASE, busy=[], endpoints_max=1, deliveries_max=1
    )
    bench.clock.advance(LEASE)
    assert await bench.deliver() == 1
    failed = Attempt(NOW, 10_000, None, "did not answer within 10 s")
    for next_attempt_at in (NOW + timedelta(seconds=10), None):
        await store.record_attempt(late, failed, now=bench.clock.now(), next_attempt_at=next_attempt_at)
    delivery = await bench.delivery(endpoint)
    assert (delivery.state, delivery.next_attempt_at, len(delivery.attempts)) == (DeliveryState.DELIVERED, None, 3)


async def test_an_endpoint_that_never_answers_holds_up_no_other(bench: WebhookBench, receiver: Receiver) -> None:
    async with open_receiver() as silent:
        silent.always = SILENCE
        await bench.endpoint(silent)
        await bench.endpoint(receiver)
        await bench.happen(40)
        # Far longer than all else takes: the silent one is still being waited for.
        async with (
            open_webhook_client(allow_private=True, timeout_seconds=100) as bench.client,
            bench.worker() as worker,
        ):

            async def came() -> bool:
                await worker.deliver_due()
                return len(receiver.received) == 40

            await until(came, "the other has all of its messages", seconds=60)
        # And is itself asked no more than it was meant to be at once.
        assert len(silent.received) == 4


async def test_for_a_day_after_a_rotation_both_secrets_sign(bench: WebhookBench, receiver: Receiver) -> None:
    endpoint, old = await bench.endpoint(receiver)
    _, secret = await bench.service.rotate_secret(bench.org_id, endpoint.endpoint_id)
    new = secret_text(secret)
    await bench.happen()
    bench.clock.advance(PREVIOUS_SECRET_KEPT - timedelta(microseconds=1))
    await bench.deliver()
    bench.clock.advance(timedelta(microseconds=1))
    await bench.happen()
    await bench.deliver()
    during, after = receiver.received
    assert (during.is_signed_with(new), during.is_signed_with(old)) == (True, True)
    assert (after.is_signed_with(new), after.is_signed_with(old)) == (True, False)


async def test_deleting_an_endpoint_ends_its_deliveries_also_those_under_way(
    bench: WebhookBench, receiver: Receiver
) -> None:
    endpoint, _ = await bench.endpoint(receiver)
    await bench.happen(2)
    store = WebhookDeliveryStore(bench.pool)
    await store.add_deliveries(now=NOW, endpoints_max=1, events_max=10)
    first, _ = await store.claim_deliveries(
        now=NOW, leased_until=NOW + LEASE, busy=[], endpoints_max=1, deliveries_max=2
    )
    await bench.service.delete_endpoint(bench.org_id, endpoint.endpoint_id)
    await store.record_attempt(first, Attempt(NOW, 1, 200, None), now=NOW, next_attempt_at=None)
    bench.clock.advance(timedelta(days=1))
    assert await bench.deliver() == 0
    with pytest.raises(NotFound):
        await bench.deliveries(endpoint)
    for table in ("webhook_endpoint", "webhook_delivery", "webhook_attempt"):
        assert await bench.pool.fetchval(f"SELECT count(*) FROM quota.{table}") == 0


async def test_closed_deliveries_are_forgotten_after_a_month_and_open_ones_never(
    bench: WebhookBench, receiver: Receiver
) -> None:
    endpoint, _ = await bench.endpoint(receiver)
    await bench.happen(2)
    receiver.answers.extend([200, 500])
    await bench.deliver()
    async with bench.worker() as worker:
        bench.clock.set(NOW + KEPT_AFTER_CLOSING)
        await worker.prune()
        assert len(await bench.deliveries(endpoint)) == 2
        bench.clock.advance(timedelta(microseconds=1))
        await worker.prune()
    (left,) = await bench.deliveries(endpoint)
    assert left.state == DeliveryState.PENDING


async def test_an_organization_has_a_bounded_number_of_endpoints_and_only_its_own(
    bench: WebhookBench, receiver: Receiver
) -> None:
    made = [await bench.endpoint(receiver) for _ in range(ENDPOINTS_MAX)]
    with pytest.raises(FailedPrecondition):
        await bench.endpoint(receiver)
    other = WebhookBench(bench.pool, bench.client)
    await other.endpoint(receiver)
    endpoint_id = made[0][0].endpoint_id
    for refused in (
        other.service.get_endpoint(other.org_id, endpoint_id),
        other.service.delete_endpoint(other.org_id, endpoint_id),
        other.service.rotate_secret(other.org_id, endpoint_id),
        other.service.list_deliveries(other.org_id, endpoint_id, before=None, limit=1),
    ):
        with pytest.raises(NotFound):
            await refused
    await bench.service.delete_endpoint(bench.org_id, endpoint_id)
    await bench.endpoint(receiver)


async def test_lists_are_read_page_by_page(bench: WebhookBench, receiver: Receiver) -> None:
    endpoint, _ = await bench.endpoint(receiver)
    others = [(await bench.endpoint(receiver))[0] for _ in range(2)]
    first = await bench.service.list_endpoints(bench.org_id, after=None, limit=2)
    rest = await bench.service.list_endpoints(bench.org_id, after=first[-1].endpoint_id, limit=2)
    assert [*first, *rest] == [endpoint, *others]
    await bench.happen(3)
    receiver.answers.extend([500] * 4)
    await bench.deliver()
    newest = await bench.service.list_deliveries(bench.org_id, endpoint.endpoint_id, before=None, limit=2)
    oldest = await bench.service.list_deliveries(bench.org_id, endpoint.endpoint_id, before=2, limit=2)
    assert [delivery.position for delivery in [*newest, *oldest]] == [3, 2, 1]
    assert all(len(delivery.attempts) == 1 for delivery in [*newest, *oldest])
