"""Which content a LoRA request means: stamps, ids, keys of the prefix cache."""

import asyncio
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from loras import ask
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.patches import lora_requests
from vllm_adafuse.serving import versions as seam
from vllm_adafuse.serving.adapters import split_path, stamp_path
from vllm_adafuse.serving.engine_loads import AsyncEngineLoads
from vllm_adafuse.serving.holds import Holds
from vllm_adafuse.serving.pool import Size
from vllm_adafuse.serving.versions import MAX_ID, AdapterAbsent, AdapterRefused, Versions, loading

DIGESTS = [f"{i:064x}" for i in range(300)]
lora_requests.apply()


class Disk:
    """Directories whose contents are single numbers; counts who opens them."""

    def __init__(self, **contents):
        self.contents, self.opened = contents, []

    def __call__(self, path, again):
        self.opened.append(path)
        if path not in self.contents:
            raise AdapterAbsent(f"adapter {path}", ["no such directory"])
        digest = DIGESTS[self.contents[path]]
        return SimpleNamespace(digest=digest, size=Size(1), path=path)


def versions_on(disk):
    return Versions(disk, 4, 64)


def test_the_first_content_keeps_the_users_id_and_a_reload_gets_one_of_its_own():
    disk = Disk(p=1)
    versions = versions_on(disk)
    first = ask(versions, "a", 7, "p")
    assert (first.lora_int_id, first.lora_path) == (7, stamp_path("p", DIGESTS[1], Size(1)))
    disk.contents["p"] = 2
    assert ask(versions, "a", 7, "p") is first  # vLLM reads files anew when it is told to
    second = ask(versions, "a", 7, "p", load_inplace=True)
    assert split_path(second.lora_path) == ("p", DIGESTS[2])
    assert second.lora_int_id not in (7, 0) and second.lora_int_id <= MAX_ID
    assert ask(versions, "a", 7, "p") is second
    assert versions.standing(7) is second and versions.users_ids([7, 9]) == {7, 9}
    assert versions.users_ids([7, second.lora_int_id]) == {7}
    disk.contents["p"] = 1
    assert ask(versions, "a", 7, "p", load_inplace=True).lora_int_id == 7


def test_equal_content_reloaded_is_no_new_version():
    versions = versions_on(Disk(p=1))
    first = ask(versions, "a", 7, "p")
    assert ask(versions, "a", 7, "p", load_inplace=True) == first
    assert versions.standing(7) == first


def test_a_stamped_request_passes_without_a_look_at_the_disk():
    disk = Disk(p=1)
    versions = versions_on(disk)
    stamped = ask(versions, "a", 7, "p")
    disk.contents.clear()
    assert versions.stamp(stamped) is stamped and versions.known(stamped) is stamped
    assert disk.opened == ["p"]
    # From elsewhere: read, and the content must be that one.
    disk.contents["p"] = 1
    assert versions_on(disk).stamp(stamped) == stamped
    disk.contents["p"] = 2
    with pytest.raises(AdapterRefused, match=f"hash {DIGESTS[2]}, expected {DIGESTS[1]}"):
        versions_on(disk).stamp(stamped)


def test_one_id_for_other_adapters_does_not_mix_them():
    """vLLM would serve the first one for both."""
    versions = versions_on(Disk(p=1, q=2))
    one, other = ask(versions, "a", 7, "p"), ask(versions, "b", 7, "q")
    assert one.lora_int_id != other.lora_int_id
    assert ask(versions, "a", 7, "p") is one and ask(versions, "b", 7, "q") is other


def test_two_ids_with_one_content_are_two_adapters():
    versions = versions_on(Disk(p=1))
    assert [ask(versions, "a", i, "p").lora_int_id for i in (1, 2, 3)] == [1, 2, 3]
    assert versions.forget(2) == [2] and versions.users_ids({1, 3}) == {1, 3}


def test_a_removed_adapter_is_read_again():
    disk = Disk(p=1)
    versions = versions_on(disk)
    ask(versions, "a", 7, "p")
    disk.contents["p"] = 2
    second = ask(versions, "a", 7, "p", load_inplace=True)
    versions.holds.resident = {7, second.lora_int_id, 8}
    assert versions.forget(7) == [7, second.lora_int_id] and versions.standing(7) is None
    assert versions.users_ids([7, second.lora_int_id]) == set()
    disk.contents["p"] = 3
    third = ask(versions, "a", 7, "p")
    assert split_path(third.lora_path)[1] == DIGESTS[3]
    assert third.lora_int_id not in (7, second.lora_int_id)  # requests may still have those
    assert versions.forget(99) == [99]


def test_large_ids_of_users():
    """The resolvers of vLLM give 63 bits, a V2 runner keeps 31."""
    versions = versions_on(Disk(p=1))
    stamped = ask(versions, "a", MAX_ID + 1, "p")
    assert 0 < stamped.lora_int_id <= MAX_ID
    assert versions.users_ids([stamped.lora_int_id]) == {MAX_ID + 1}


def test_over_http_ids_are_of_name_and_content():
    """Also in two servers' processes, whose counters know nothing of each other."""
    ids = []
    for count in (1, 5):
        versions = versions_on(Disk(p=1, q=2))
        with loading():
            stamped = [
                versions.stamp(LoRARequest(name, count, path))
                for name, path in (("a", "p"), ("a", "q"), ("b", "p"))
            ]
            ids.append([request.lora_int_id for request in stamped])
    assert ids[0] == ids[1] and len(set(ids[0])) == 3 and 1 not in ids[0]
    assert versions.users_ids(ids[0]) == set()  # names stand for none yet
    for request in stamped[1:]:
        versions.adopt_name(request)
    assert versions.users_ids(ids[0]) == set(ids[0])


def test_hashes_that_collide_give_other_ids(monkeypatch):
    real = seam.hashlib.sha256

    def few(seed):  # 31 bits, of which two are left
        return SimpleNamespace(digest=lambda: bytes([real(seed).digest()[0] & 3, 0, 0, 0]))

    monkeypatch.setattr(seam.hashlib, "sha256", few)
    versions = versions_on(Disk(**{f"p{i}": i for i in range(3)}))
    with loading():
        stamped = [versions.stamp(LoRARequest("a", 1, f"p{i}")) for i in range(3)]
    assert {s.lora_int_id for s in stamped} == {1, 2, 3}
    # A user's own id may be one of them already.
    assert ask(versions_on(Disk(p=1)), "a", 2, "p").lora_int_id == 2
    user = versions_on(Disk(p=1, q=2))
    with loading():
        taken = user.stamp(LoRARequest("a", 1, "p")).lora_int_id
    assert ask(user, "b", taken, "q").lora_int_id != taken


def test_contents_that_are_used_stay_remembered(monkeypatch):
    monkeypatch.setattr(seam, "MAX_CONTENTS", 8)
    disk = Disk(p=0)
    versions = versions_on(disk)
    kept = ask(versions, "kept", 1000, "p")
    for i in range(1, 100):
        disk.contents[f"p{i}"] = i
        ask(versions, "a", i, f"p{i}")
        assert versions.known(kept) is kept
    assert len(versions._contents) == 8


@pytest.mark.parametrize("stays", [False, True])
def test_a_load_whose_client_went_is_forgotten_when_it_ends(stays):
    """Unless another wants the adapter."""
    ready, end, has = asyncio.Event(), asyncio.Event(), set()

    async def add(stamped):
        await asyncio.sleep(0)
        has.update([stamped.lora_int_id] if ready.is_set() else [])
        return ready.is_set()

    async def remove(adapter):
        has.remove(adapter)

    async def work():
        holds = Holds(4, lambda adapter: False)  # nor could it make room: its files have gone too
        core = SimpleNamespace(add_lora_async=add, remove_lora_async=remove)
        loads = AsyncEngineLoads(core, holds)

        async def want():
            with holds.held(7):
                await loads.load_beside(LoRARequest("a", 7, "/a"))
                await end.wait()

        clients = [asyncio.create_task(want()) for _ in range(1 + stays)]
        await asyncio.sleep(0)
        clients[0].cancel()
        await asyncio.sleep(0.01)
        ready.set()
        while loads._loads or loads._removals or holds.resident != ({7} if stays else set()):
            await asyncio.sleep(0.01)
        assert has == holds.resident == ({7} if stays else set())
        end.set()
        await asyncio.gather(*clients, return_exceptions=True)

    asyncio.run(asyncio.wait_for(work(), 30))


def test_outputs_show_the_users_request():
    disk = Disk(p=1)
    versions = versions_on(disk)
    request = LoRARequest("a", 7, "p", base_model_name="m")
    stamped = versions.adopt(request, versions.stamp(request))
    assert versions.users_request(stamped) is request and stamped.base_model_name == "m"
    stranger = LoRARequest("b", 7, "p")
    assert versions.users_request(stranger) is stranger


def test_many_threads_agree():
    disk = Disk(**{f"p{i}": i for i in range(20)})
    versions = versions_on(disk)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda i: ask(versions, f"a{i % 20}", 5, f"p{i % 20}"), range(400)))
    by_name = {}
    for stamped in found:
        by_name.setdefault(stamped.lora_name, set()).add((stamped.lora_int_id, stamped.lora_path))
    assert all(len(ids) == 1 for ids in by_name.values())
    assert len({i for ids in by_name.values() for i, _ in ids}) == 20


# vLLM's own code with what is put into it.


def test_requests_of_two_versions_are_two():
    one, other = LoRARequest("a", 1, "p"), LoRARequest("a", 2, "p")
    assert one != other and len({one, other}) == 2
    assert one == LoRARequest("a", 1, "q") and hash(one) == hash(other) and one != "a"


def test_the_path_that_people_see_has_no_stamp():
    assert LoRARequest("a", 1, stamp_path("/x/y", DIGESTS[0])).path == "/x/y"
    assert LoRARequest("a", 1, "/x/y").path == "/x/y"


def block_keys(lora):
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

    request = SimpleNamespace(
        lora_request=lora, mm_features=[], cache_salt="salt", prompt_embeds=None
    )
    return generate_block_hash_extra_keys(request, 0, 16, 0)[0]


def test_prefix_blocks_are_keyed_by_content():
    digests = DIGESTS[:2]
    first, second = (block_keys(LoRARequest("a", 1, stamp_path("/x", d))) for d in digests)
    assert first != second and first[1:] == second[1:] == (("cache_salt", "salt"),)
    assert first[0] == ("lora", "a", digests[0])
    other_place = LoRARequest("a", 5, stamp_path("/y", digests[0]))
    assert block_keys(other_place) == first  # the same content, so the same blocks
    assert block_keys(LoRARequest("a", 1, "/x"))[0] == ("lora", "a", "/x")
    assert block_keys(None) == (("cache_salt", "salt"),)


def test_prefix_keys_of_the_oldest_vllm(monkeypatch):
    """Its keys are bare names."""
    import vllm.v1.core.kv_cache_utils as kv

    monkeypatch.setattr(kv, "_gen_lora_extra_hash_keys", lambda request: ["a"])
    lora_requests._key_by_content()
    lora = LoRARequest("a", 1, stamp_path("/x", DIGESTS[1]))
    assert kv._gen_lora_extra_hash_keys(SimpleNamespace(lora_request=lora)) == ["a", DIGESTS[1]]


def test_a_seam_that_has_moved_is_told():
    class Moved:
        def add_lora(self, request):
            pass

    with pytest.raises(RuntimeError, match=r"Moved\.add_lora no longer takes \(self, lora_req"):
        lora_requests.wrap(Moved, "add_lora", ("self", "lora_request"), lambda original: original)
    with pytest.raises(RuntimeError, match=r"Moved\.gone no longer"):
        lora_requests.wrap(Moved, "gone", ("self",), lambda original: original)


def test_the_error_is_the_clients_in_every_vllm():
    for kind in (AdapterRefused, AdapterAbsent):
        error = kind("adapter /x", ["one", "two"])
        assert isinstance(error, (VLLMValidationError,)) and isinstance(error, ValueError)
        assert isinstance(error, AdapterError) and error.parameter is None
        text = "adapter /x cannot be used:\n  - one\n  - two"
        again = pickle.loads(pickle.dumps(error))
        assert str(error) == str(again) == text and type(again) is kind
        # As vLLM passes a worker's error on.
        told = AdapterRefused.from_text(f"Worker failed with error '{text}\n', please check the")
        assert (told.subject, told.problems) == ("adapter /x", ["one", "two"])
    assert AdapterRefused.from_text("Worker failed with error 'out of memory'") is None
