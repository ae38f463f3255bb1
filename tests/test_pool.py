"""The pool's bookkeeping, against a model of it that keeps a list of everything."""

import random

import pytest
from vllm_adafuse.serving.pool import Pool, Size, misfits, pages_of_rank, pool_size, total


def test_sizes_in_whole_pages():
    assert [pages_of_rank(rank) for rank in (1, 16, 17, 40, 512)] == [1, 1, 2, 3, 32]
    assert pool_size(4, 128) == Size(32, 16)
    assert pool_size(3, 8) == Size(3, 12)
    assert pool_size(1, 1) == Size(1, 8)
    assert pool_size(64, 64) == Size(256, 256)  # 256 experts of a page each
    assert pool_size(100, 16) == Size(100, 256)


@pytest.mark.parametrize("rank", [1, 8, 16, 40])
def test_adapters_of_the_rank_that_the_option_names_fit_as_many_as_it_says(rank):
    """However small the rank: each takes whole pages."""
    own = Size(pages_of_rank(rank))
    assert total([own] * 3).within(pool_size(3, rank))
    assert not misfits(Size(3 * own.pages), max_loras=3, max_lora_rank=rank)
    [problem] = misfits(Size(3 * own.pages + 1), max_loras=3, max_lora_rank=rank)
    assert f"takes {3 * own.pages + 1} pages of 16 ranks, and the pool has {3 * own.pages}" in problem
    assert f"of ranks in whole pages, is {16 * (3 * own.pages + 1)} or more" in problem
    assert f"(it is {16 * 3 * own.pages})" in problem
    assert "--max-lora-rank" in problem and "--max-loras" in problem


def test_too_many_experts_per_token():
    assert not misfits(Size(1, 8), max_loras=1, max_lora_rank=16)
    [problem] = misfits(Size(1, 9), max_loras=1, max_lora_rank=16)
    assert "takes 9 columns" in problem and "8 are reserved" in problem
    assert "raise --max-loras to 3 or more" in problem
    assert not misfits(Size(1, 9), max_loras=3, max_lora_rank=16)
    assert not misfits(Size(256, 256), max_loras=64, max_lora_rank=64)
    [problem] = misfits(Size(1, 256), max_loras=63, max_lora_rank=16)
    assert "252 are reserved: raise --max-loras to 64 or more" in problem
    [problem] = misfits(Size(1, 257), max_loras=99, max_lora_rank=16)
    assert "can have 256; serve it by hf_overrides" in problem


def test_the_one_used_least_recently_makes_room():
    pool = Pool(Size(4, 4))
    assert pool.hold({1: Size(2), 2: Size(1, 2)}) == [1, 2]
    assert pool.placed[1].pages == (0, 1)
    assert pool.placed[2].pages == (2,) and pool.placed[2].columns == (0, 1)
    assert pool.hold({1: Size(2)}) == []
    assert pool.hold({3: Size(2)}) == [3]
    assert list(pool.placed) == [1, 3] and pool.placed[3].pages == (2, 3)
    assert pool.taken == Size(4)


def test_columns_too_make_room():
    pool = Pool(Size(8, 3))
    pool.hold({1: Size(1, 2)})
    pool.hold({2: Size(1, 2)})
    assert list(pool.placed) == [2]


def test_pinned_ones_make_room_last():
    pool = Pool(Size(2))
    pool.hold({1: Size(1)})
    pool.hold({2: Size(1)})
    pool.pinned = {1}
    pool.hold({3: Size(1)})
    assert list(pool.placed) == [1, 3]
    pool.hold({4: Size(2)})  # only so can the step run
    assert list(pool.placed) == [4]


def test_too_much_at_once_changes_nothing():
    pool = Pool(Size(4, 1))
    pool.hold({1: Size(2)})
    for wanted in ({2: Size(3), 3: Size(2)}, {2: Size(1, 2)}):
        with pytest.raises(ValueError, match="does not fit"):
            pool.hold(wanted)
    assert list(pool.placed) == [1]


def test_random_sequences():
    draw = random.Random(0)
    for _ in range(60):
        size = Size(draw.randint(2, 12), draw.randint(2, 6))
        pool, sizes, recent = Pool(size), {}, []
        for _ in range(80):
            if draw.random() < 0.2 and recent:
                gone = draw.choice(recent)
                assert pool.release(gone)
                recent.remove(gone)
                assert not pool.release(gone)
                continue
            wanted, left = {}, size
            for adapter in draw.sample(range(15), draw.randint(1, 4)):
                own = sizes.setdefault(adapter, Size(draw.randint(1, 4), draw.choice([0, 0, 1, 2])))
                if own.within(left):
                    wanted[adapter] = own
                    left = Size(left.pages - own.pages, left.columns - own.columns)
            before = dict(pool.placed)
            new = pool.hold(wanted)
            assert new == [i for i in wanted if i not in before]
            # Those that stay have not moved, and who went was used before all others that stayed.
            stayed = [i for i in recent if i in pool.placed and i not in wanted]
            went = [i for i in recent if i not in pool.placed]
            assert all(pool.placed[i] == before[i] for i in before if i in pool.placed)
            assert [i for i in recent if i not in wanted] == went + stayed
            recent = stayed + [i for i in wanted if i not in new] + new
            assert list(pool.placed) == recent
            places = pool.placed.values()
            for used, count in (
                ([p for place in places for p in place.pages], size.pages),
                ([c for place in places for c in place.columns], size.columns),
            ):
                assert len(set(used)) == len(used) <= count
                assert all(0 <= i < count for i in used)
            assert all(pool.placed[i].size == sizes[i] for i in pool.placed)
