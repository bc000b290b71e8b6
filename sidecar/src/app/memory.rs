//! Gives memory back that was freed. glibc keeps what connections leave behind: free pages between others stay
//! resident until somebody asks for them, `malloc_trim(3)`. That is done where it pays, seldom and off the path of
//! requests: a worker that allocates meanwhile waits for it. Other C libraries see to it themselves.
#![allow(unsafe_code)]

use std::time::Duration;

/// How often free memory is looked at.
const LOOK: Duration = Duration::from_secs(10);
/// Bytes freed since the last time that are worth it.
const WORTH: usize = 4 * 1024 * 1024;

/// Gives back, now and then, what was freed since. Never ends.
pub(super) async fn give_back() {
    let mut kept = 0;
    loop {
        tokio::time::sleep(LOOK).await;
        let free_now = free();
        // What is in use again is not freed any more; free pages that were given back still count as free.
        kept = kept.min(free_now);
        if free_now - kept >= WORTH {
            // Some milliseconds for each 10 MB: not on a thread that others wait for.
            let _panicked = tokio::task::spawn_blocking(trim).await;
            kept = free();
        }
    }
}

/// Bytes that the allocator has and nobody uses.
#[cfg(target_env = "gnu")]
fn free() -> usize {
    // SAFETY: counts what the allocator has, under its own locks; takes nothing from us.
    let counters = unsafe { nix::libc::mallinfo() };
    // Of 32 bits. Its successor has more, and came with glibc 2.33 only.
    counters.fordblks as u32 as usize
}

#[cfg(target_env = "gnu")]
fn trim() {
    // SAFETY: touches only memory that is free, under the allocator's own locks.
    unsafe { nix::libc::malloc_trim(0) };
}

#[cfg(not(target_env = "gnu"))]
fn free() -> usize {
    0
}

#[cfg(not(target_env = "gnu"))]
fn trim() {}

#[cfg(all(test, target_env = "gnu"))]
mod tests {
    use super::*;

    const PIECES: usize = 4000;
    const PIECE: usize = 20_000;

    fn resident() -> usize {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    }

    #[tokio::test(start_paused = true)]
    async fn what_many_connections_left_behind_is_given_back() {
        tokio::spawn(give_back());
        let before = resident();
        let mut kept = Vec::with_capacity(PIECES);
        let mut freed = Vec::with_capacity(PIECES);
        for _ in 0..PIECES {
            freed.push(vec![1_u8; PIECE]);
            // So that nothing can be given back from the end alone.
            kept.push(vec![1_u8; 64]);
        }
        let at_most = resident();
        assert!(at_most - before > PIECES * PIECE / 2, "{before} to {at_most}");
        drop(freed);
        tokio::time::sleep(LOOK * 3).await;
        let after = resident();
        assert!(at_most - after > PIECES * PIECE / 2, "{before} to {at_most}, and back to {after} only");
        drop(kept);
    }
}
