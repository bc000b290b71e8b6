//! The laws of the house that a machine can check (ARCHITECTURE.md, "Four laws").

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// The programs whose `lib.rs` lists modules, top layer first.
const PROGRAMS: [&str; 3] = ["sidecar", "injector", "cert-authority"];

/// The modules of a program in the order of its `lib.rs`: the top layer first.
fn rooms(program: &str) -> Vec<String> {
    let list = fs::read_to_string(source(program).join("lib.rs")).expect("a lib.rs");
    list.lines()
        .filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'))
        .map(str::to_owned)
        .collect()
}

fn source(program: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(program).join("src")
}

/// Every `.rs` file below a folder, with its text.
fn sources(folder: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).expect("a readable folder") {
        let path = entry.expect("a folder entry").path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|end| end == "rs") {
            let text = fs::read_to_string(&path).expect("a source file");
            found.insert(path, text);
        }
    }
    found
}

/// The rooms that a piece of code names: `crate::ROOM` and the members of `use crate::{…}`.
fn rooms_named(text: &str) -> Vec<String> {
    let code: String =
        text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n");
    let mut named = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            named.extend(first_words_of_group(group));
        } else {
            named.push(word(rest));
        }
    }
    named
}

/// The first path segment of each member of a `use` group, up to its closing brace.
fn first_words_of_group(group: &str) -> Vec<String> {
    let (mut depth, mut start, mut words) = (0, 0, Vec::new());
    for (at, character) in group.char_indices() {
        match character {
            '{' => depth += 1,
            '}' if depth == 0 => {
                words.push(word(group[start..at].trim()));
                break;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                words.push(word(group[start..at].trim()));
                start = at + 1;
            }
            _ => {}
        }
    }
    words
}

fn word(text: &str) -> String {
    text.chars().take_while(|character| character.is_alphanumeric() || *character == '_').collect()
}

fn room_of(path: &Path, program: &str) -> String {
    let inside = path.strip_prefix(source(program)).expect("a path in the program");
    let first = inside.components().next().expect("a file name").as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_owned()
}

fn is_test(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == "tests.rs")
        || path.components().any(|part| part.as_os_str() == "tests")
}

#[test]
fn a_module_uses_only_modules_below_it() {
    let mut wrong = Vec::new();
    for program in PROGRAMS {
        let rooms = rooms(program);
        assert!(rooms.len() >= 10, "the modules of {program} could not be read: {rooms:?}");
        let floor = |room: &str| rooms.iter().position(|name| name == room);
        for (path, text) in sources(&source(program)) {
            let room = room_of(&path, program);
            if matches!(room.as_str(), "lib" | "main") {
                continue;
            }
            let Some(own) = floor(&room) else {
                wrong.push(format!("{} belongs to no module of lib.rs", path.display()));
                continue;
            };
            for used in rooms_named(&text) {
                if !is_test(&path) && floor(&used).is_some_and(|other| other < own) {
                    wrong.push(format!("{} uses `{used}`, which stands above `{room}`", path.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "imports point up:\n{}", wrong.join("\n"));
}

#[test]
fn the_check_sees_an_import_that_points_up() {
    assert_eq!(
        rooms_named("use crate::{app, model::{a, b}, net};\nlet x = crate::outbound::run();"),
        ["app", "model", "net", "outbound"]
    );
    assert_eq!(rooms_named("// crate::app is above\n"), Vec::<String>::new());
}

#[test]
fn nothing_imports_everything_from_its_parent() {
    let mut wrong = Vec::new();
    for program in ["sidecar", "injector", "cert-authority", "proto"] {
        for (path, text) in
            sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(program).join("src"))
        {
            let product = text.split("#[cfg(test)]").next().unwrap_or_default();
            if !is_test(&path) && product.contains("use super::*") {
                wrong.push(path.display().to_string());
            }
        }
    }
    assert!(wrong.is_empty(), "`use super::*` outside tests: {wrong:?}");
}

#[test]
fn unsafe_stands_in_the_named_files_and_nowhere_else() {
    // `unsafe_code` is denied in the whole workspace: whoever needs it has to allow it.
    const NAMED: [&str; 2] = ["sidecar/src/app/memory.rs", "sidecar/src/redirect/namespace.rs"];
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut found = Vec::new();
    for folder in ["sidecar/src", "injector/src", "cert-authority/src", "proto/src", "tests/src"] {
        for (path, text) in sources(&root.join(folder)) {
            let inside = path.strip_prefix(&root).expect("a path in the project");
            let lifted = ["allow(unsafe_code", "expect(unsafe_code"].iter().any(|lint| text.contains(lint));
            if lifted {
                found.push(inside.to_string_lossy().into_owned());
            }
        }
    }
    found.sort();
    assert_eq!(found, NAMED, "the files with `unsafe`, and those that this test names");
}
