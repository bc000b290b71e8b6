//! Who is believed, and who reaches what: hostile peers, real sidecars in pods. docs/security.md points here.

#[path = "trust/capture.rs"]
mod capture;
#[path = "trust/change.rs"]
mod change;
#[path = "trust/claims.rs"]
mod claims;
#[path = "trust/ending.rs"]
mod ending;
#[path = "trust/names.rs"]
mod names;
#[path = "trust/outbound.rs"]
mod outbound;
#[path = "trust/reach.rs"]
mod reach;
#[path = "trust/refusals.rs"]
mod refusals;
#[path = "trust/scene.rs"]
mod scene;

use std::{fs, path::Path};

#[test]
fn the_documentation_points_to_tests_that_exist() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(here.join("../docs/security.md")).unwrap();
    let named: Vec<(&str, &str)> =
        text.split('`').filter_map(|word| word.split_once("::")).filter(|(_, test)| *test != "*").collect();
    assert!(named.len() > 15, "{named:?}");
    for (module, test) in named {
        let code = fs::read_to_string(here.join(format!("tests/trust/{module}.rs"))).unwrap_or_default();
        assert!(code.contains(&format!("fn {test}()")), "no test {module}::{test}");
    }
}
