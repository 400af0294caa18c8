"""Blocks of memory that are used again."""

from trainer.memory import KEEP_BYTES, MemoryPool

MIB = 1 << 20


def addresses(blocks: list) -> set[int]:
    return {block.data_ptr() for block in blocks}


def test_a_step_uses_the_memory_of_the_one_before_however_much_it_is() -> None:
    pool = MemoryPool()
    sizes = [8 * MIB] * 12 + [MIB] * 4
    assert sum(sizes) > KEEP_BYTES
    first = [pool.take(size) for size in sizes]
    seen = addresses(first)
    for _ in range(3):
        while first:
            pool.give(first.pop())
        pool.new_round()
        first = [pool.take(size) for size in sizes]
        assert addresses(first) == seen


def test_what_is_not_used_any_more_goes() -> None:
    pool = MemoryPool()
    for block in [pool.take(8 * MIB) for _ in range(16)]:
        pool.give(block)
    assert pool.free_bytes == 128 * MIB
    for _ in range(2):
        pool.new_round()
        pool.give(pool.take(MIB))
    assert pool.free_bytes <= KEEP_BYTES


def test_what_waits_never_adds_to_the_most_that_was_in_use() -> None:
    pool = MemoryPool()
    for size in (8 * MIB, 4 * MIB, 2 * MIB):
        blocks = [pool.take(size) for _ in range(128 * MIB // size)]
        assert pool.free_bytes <= KEEP_BYTES
        for block in blocks:
            pool.give(block)
    assert pool.free_bytes <= 128 * MIB
