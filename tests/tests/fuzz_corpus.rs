//! The fuzzer's targets without a fuzzer: the seeds of `tests/fuzz`, every beginning of them, and some thousands
//! of seeded random mutations. `tests/fuzz/run` looks further.

use std::{fs, path::PathBuf};

#[path = "../fuzz/src/targets.rs"]
mod targets;

const MUTATIONS: usize = 10_000;

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
    let listed = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<PathBuf> = listed.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// Changes, takes out, doubles or joins.
fn mutate(bytes: &mut Vec<u8>, other: &[u8], random: &mut fastrand::Rng) {
    const TELLING: &[u8] = b"\0\x01\x7f\x80\xff\r\n\t :;,./@%#[]{}\"'-+09aAzZ";
    let at = random.usize(..=bytes.len());
    match random.u8(..6) {
        0 if at < bytes.len() => bytes[at] = random.u8(..),
        1 if at < bytes.len() => bytes[at] ^= 1 << random.u8(..8),
        2 => bytes.insert(at, TELLING[random.usize(..TELLING.len())]),
        3 => drop(bytes.drain(at..random.usize(at..=bytes.len()))),
        4 => {
            let part = bytes[at..random.usize(at..=bytes.len())].to_vec();
            bytes.splice(at..at, part);
        }
        _ => {
            let from = random.usize(..=other.len());
            bytes.truncate(at);
            bytes.extend_from_slice(&other[from..]);
        }
    }
}

#[test]
fn no_parser_breaks_its_promise() {
    for (name, target) in targets::TARGETS {
        let seeds = seeds(name);
        assert!(!seeds.is_empty(), "no seeds for {name}");
        for seed in &seeds {
            (0..=seed.len()).for_each(|length| target(&seed[..length]));
        }
        let mut random = fastrand::Rng::with_seed(2);
        for round in 0..MUTATIONS {
            let mut bytes = seeds[round % seeds.len()].clone();
            let other = &seeds[random.usize(..seeds.len())];
            for _ in 0..random.usize(1..6) {
                mutate(&mut bytes, other, &mut random);
            }
            bytes.truncate(4096);
            let ran = std::panic::catch_unwind(|| target(&bytes));
            assert!(ran.is_ok(), "{name} with {:?}", String::from_utf8_lossy(&bytes));
        }
    }
}
