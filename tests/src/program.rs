//! The programs of Weft as they were built, and whether a test can run here at all.

use std::{
    env, fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use tempfile::TempDir;

/// What a test needs from the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// To be root, for network namespaces.
    Root,
    /// A program, with the Debian package that has it.
    Program(&'static str, &'static str),
    /// The Python of [`python`], with the packages that `tests/run` puts there.
    Python,
}

/// Can this test run here? If not, it fails with what is missing; with `WEFT_TESTS_ALLOW_SKIP=1` it prints
/// `SKIPPED: …` instead, which `tests/run` counts, and gives false.
///
/// # Panics
/// If something is missing and skipping is not allowed.
#[must_use]
pub fn can_run(needs: &[Need]) -> bool {
    let missing: Vec<String> = needs.iter().filter_map(|need| need.missing()).collect();
    if missing.is_empty() {
        return true;
    }
    let reason = missing.join("; ");
    assert!(
        env::var("WEFT_TESTS_ALLOW_SKIP").as_deref() == Ok("1"),
        "this test cannot run: {reason}. (WEFT_TESTS_ALLOW_SKIP=1 counts it as skipped instead.)"
    );
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    // not with eprintln, which the test runner keeps to itself when a test passes
    let _ = writeln!(std::io::stderr(), "SKIPPED: {name}: {reason}");
    false
}

impl Need {
    fn missing(self) -> Option<String> {
        match self {
            Need::Root => (!nix::unistd::geteuid().is_root()).then(|| "it takes root".to_owned()),
            Need::Program(name, package) => find(name)
                .is_none()
                .then(|| format!("the program `{name}` is missing (apt-get install {package})")),
            Need::Python => (!python().is_file())
                .then(|| format!("{} is missing (tests/run makes it)", python().display())),
        }
    }
}

/// Python of a virtual environment with the packages of the tests.
pub fn python() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("target/test-venv/bin/python")
}

fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|folder| folder.join(name))
        .find(|program| program.is_file())
}

/// Where a program of the workspace was built: beside this test.
///
/// # Panics
/// If it was not built.
pub fn program(name: &str) -> PathBuf {
    let test = env::current_exe().expect("the path of this test");
    let profile = test.ancestors().find(|folder| folder.join(name).is_file());
    match profile {
        Some(folder) => folder.join(name),
        None => panic!("{name} is not built; run `cargo build --workspace --bins` first, or tests/run"),
    }
}

/// A program in a folder where every user may run it, as a home directory is often closed to others. It is
/// there as long as the folder lives.
///
/// # Panics
/// If it cannot be put there.
pub fn program_for_everyone(program: &Path) -> (TempDir, PathBuf) {
    let folder = TempDir::with_prefix("weft-program-").expect("a temporary folder");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("its mode");
    let copy = folder.path().join(program.file_name().expect("a file name"));
    if fs::hard_link(program, &copy).is_err() {
        fs::copy(program, &copy).expect("a copy of the program");
    }
    (folder, copy)
}
