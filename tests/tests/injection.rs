//! What injection makes of pods, as golden files: `tests/injection/NAME.yaml` and `NAME.injected.yaml`, and what was said of
//! all of them in `REPORT`. `WEFT_TESTS_UPDATE=1` writes them anew; read the difference before you commit it.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use weft_tests::program;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("injection")
}

/// The files that are injected, by name.
fn inputs() -> Vec<String> {
    let files =
        fs::read_dir(folder()).expect("tests/injection").map(|entry| entry.expect("an entry").file_name());
    let mut names: Vec<String> = files
        .filter_map(|file| file.to_string_lossy().strip_suffix(".yaml").map(str::to_owned))
        .filter(|name| name != "settings" && !name.ends_with(".injected"))
        .collect();
    names.sort();
    assert!(names.len() >= 30, "{names:?}");
    names
}

/// Exit code, standard output, standard error.
fn injector(command: &str, file: &Path) -> (i32, String, String) {
    let mut run = Command::new(program("weft-injector"));
    run.arg(command).arg("-f").arg(file);
    if command == "inject" {
        run.arg("--config").arg(folder().join("settings.yaml")).args(["--namespace", "shop"]);
    }
    let output = run.output().expect("weft-injector");
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8");
    (output.status.code().expect("an exit code"), text(&output.stdout), text(&output.stderr))
}

/// The file says this already, or is made to where that is asked for.
fn check(file: &str, text: &str) {
    let path = folder().join(file);
    if env::var_os("WEFT_TESTS_UPDATE").is_some() {
        fs::write(&path, text).expect("a golden file");
    }
    let golden = fs::read_to_string(&path).unwrap_or_default();
    assert!(golden == text, "{file} is not what it was; see WEFT_TESTS_UPDATE. It would be:\n{text}");
}

#[test]
fn every_pod_becomes_what_its_golden_file_says() {
    let mut report = String::new();
    for name in inputs() {
        let (code, made, said) = injector("inject", &folder().join(format!("{name}.yaml")));
        report.push_str(&format!("{name}: exit code {code}\n{said}"));
        if code == 0 {
            check(&format!("{name}.injected.yaml"), &made);
        } else {
            assert_eq!(made, "", "{name}: something was written");
        }
    }
    check("REPORT", &report);
}

#[test]
fn injecting_twice_is_as_once_and_can_be_taken_back() {
    let scratch = tempfile::tempdir().expect("a folder");
    for name in inputs() {
        let original = folder().join(format!("{name}.yaml"));
        let (code, once, _) = injector("inject", &original);
        if code != 0 {
            continue;
        }
        let file = scratch.path().join("once.yaml");
        fs::write(&file, &once).expect("a file");
        assert_eq!(injector("inject", &file).1, once, "{name}");
        let (code, back, said) = injector("uninject", &file);
        assert_eq!(code, 0, "{name}: {said}");
        let original = fs::read_to_string(&original).expect("the original");
        // A handler that went to the sidecar comes back as written anew; all else is the same text.
        let rewritten = once.contains("/probe/");
        assert!(rewritten || back == original, "{name}:\n{back}");
        assert!(!back.contains("weft-sidecar") && !back.contains("/probe/"), "{name}:\n{back}");
        fs::write(&file, &back).expect("a file");
        assert_eq!(injector("inject", &file).0, 0, "{name}");
    }
}
