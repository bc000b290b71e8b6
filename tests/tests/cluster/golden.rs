//! The golden files of injection, before a real API server: it takes every one of them, and its webhook decides as the
//! command line does.

use std::{fs, path::Path};

use weft_tests::Cluster;

use crate::joining::ENABLED;

#[test]
fn the_api_server_takes_every_injected_pod_and_refuses_what_is_refused_on_files() {
    let Some(cluster) = Cluster::shared() else { return };
    cluster.namespace("golden-off", &[]);
    cluster.namespace("golden-on", &[ENABLED]);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("injection");
    let report = fs::read_to_string(folder.join("REPORT")).expect("REPORT");
    let mut taken = 0;
    for entry in fs::read_dir(&folder).expect("tests/injection") {
        let file = entry.expect("an entry").path();
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let path = file.display().to_string();
        let dry_run = |namespace: &str| {
            cluster.try_kubectl(&["-n", namespace, "apply", "--dry-run=server", "-f", &path])
        };
        if name.ends_with(".injected.yaml") {
            let answer = dry_run("golden-off");
            assert!(answer.done, "{name}: {}", answer.text);
            taken += 1;
        } else if report.contains(&format!("{}: exit code 1", name.trim_end_matches(".yaml"))) {
            let answer = dry_run("golden-on");
            let told = answer.text.contains("denied the request: weft: ");
            assert!(!answer.done && told, "{name}: {}", answer.text);
        } else if name.ends_with(".yaml") && name != "settings.yaml" {
            let answer = dry_run("golden-on");
            assert!(answer.done, "{name}: {}", answer.text);
        }
    }
    assert!(taken >= 25, "{taken}");
}
