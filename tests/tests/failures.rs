//! Every label of `Failure`, produced with real sockets: in the answer's header where there can be an answer, in
//! the access log, and in the metric. `docs/failures.md` lists them all; [`SHOWN`] says which test shows which.

#[path = "failures/arriving.rs"]
mod arriving;
#[path = "failures/bench.rs"]
mod bench;
#[path = "failures/calling.rs"]
mod calling;
#[path = "failures/identity.rs"]
mod identity;
#[path = "failures/internal.rs"]
mod internal;
#[path = "failures/registry.rs"]
mod registry;

use std::{collections::BTreeSet, fs, path::Path};

use weft_sidecar::model::Failure;

/// A test, and the failures that it shows: exactly these, which [`bench::Shown`] checks.
type Test = (&'static str, &'static [Failure]);

const SHOWN: &[Test] = &[
    calling::WHAT_THE_APP_SENDS,
    calling::WHERE_IT_SENDS_IT,
    calling::WHAT_THE_SERVER_ANSWERS,
    calling::TOO_MUCH_AT_A_TIME,
    arriving::WHAT_REACHES_THE_APP,
    identity::WHOM_WE_MEET,
    identity::NOBODY_OURSELVES,
    arriving::TOO_LONG_IN_FLIGHT,
    internal::A_BUG,
    registry::WHAT_THE_REGISTRY_HAS_NOT,
];

#[test]
fn every_failure_has_a_test() {
    let mut shown = BTreeSet::new();
    for failure in SHOWN.iter().flat_map(|(_, failures)| *failures) {
        shown.insert(failure.label());
    }
    let all: BTreeSet<_> = Failure::ALL.iter().map(|failure| failure.label()).collect();
    assert_eq!(shown, all);
}

/// The rows of its table begin with label, status and side.
#[test]
fn the_documentation_lists_every_failure_as_it_is() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/failures.md");
    let text = fs::read_to_string(file).unwrap();
    let rows: Vec<Vec<&str>> = text
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| line.split('|').map(str::trim).collect())
        .collect();
    let documented: Vec<String> = rows.iter().map(|row| row[1..4].join(" ")).collect();
    let expected: Vec<String> = Failure::ALL
        .iter()
        .map(|failure| {
            let side = format!("{:?}", failure.side()).to_lowercase();
            format!("`{}` {} {side}", failure.label(), failure.status())
        })
        .collect();
    assert_eq!(documented, expected);
    for row in rows {
        assert!(row.len() == 7 && row[4].len() > 10 && row[5].len() > 10, "cause and cure: {row:?}");
    }
}
