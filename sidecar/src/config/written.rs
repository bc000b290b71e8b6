//! Settings as written: which text stands where. Nothing is understood here beyond the names of the keys.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
};

use clap::ArgMatches;
use serde_saphyr::Spanned;
use weft_proto::names::ENV_PREFIX;

use super::keys::{KEYS, Key};

/// Values as text, with the place where each stands.
#[derive(Debug, Default)]
pub struct Written {
    entries: BTreeMap<&'static str, Entry>,
    mistakes: Vec<String>,
    names_of_variables: BTreeSet<String>,
}

/// One setting as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// At least one, unless the value was an empty list.
    pub values: Vec<String>,
    /// For error texts: the flag, the variable, or file and line.
    pub place: String,
}

/// Everything that is wrong with the settings, one line each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidSettings(pub Vec<String>);

/// Variables with our prefix that are no settings of the sidecar: the file of settings, and what `redirect` and
/// the tests read.
const OTHER_VARIABLES: [&str; 6] =
    ["WEFT_CONFIG", "WEFT_SIDECAR_UID", "WEFT_EXCLUDE_", "WEFT_INCLUDE_", "WEFT_REDIRECT_", "WEFT_TESTS_"];
/// A settings file is small; a larger one is not ours.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

impl Written {
    /// Reads flags, then `WEFT_*` variables, then the file that `--config` or `WEFT_CONFIG` names, then variables
    /// of other programs' conventions (`CONSUL_*`). The first of them that has a key wins.
    pub fn read(flags: &ArgMatches, variables: impl IntoIterator<Item = (String, String)>) -> Self {
        let (variables, others): (BTreeMap<String, String>, BTreeMap<_, _>) =
            variables.into_iter().partition(|(name, _)| name.starts_with(ENV_PREFIX));
        let mut written = Written::default();
        written.take_flags(flags);
        written.take_variables(&variables);
        let file = flags.get_one::<String>("config").or(variables.get("WEFT_CONFIG")).map(PathBuf::from);
        if let Some(file) = file {
            written.take_file(&file);
        }
        written.take_other_variables(&others);
        written
    }

    /// Reads the text of a file alone; `shown` stands for it in mistakes.
    pub fn from_text(shown: &str, text: &str) -> Self {
        let mut written = Written::default();
        written.take_text(shown, text);
        written
    }

    /// The entry of a key, where somebody wrote one.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// Was there a variable of this name, with some value? For what must not become an entry, such as a token.
    pub fn has_variable(&self, name: &str) -> bool {
        self.names_of_variables.contains(name)
    }

    /// What was wrong while reading.
    pub fn mistakes(&self) -> &[String] {
        &self.mistakes
    }

    fn take_flags(&mut self, flags: &ArgMatches) {
        for key in KEYS {
            let Ok(Some(values)) = flags.try_get_many::<String>(key.name) else { continue };
            self.put(key, values.cloned().collect(), format!("--{}", key.name));
        }
    }

    fn take_other_variables(&mut self, variables: &BTreeMap<String, String>) {
        let with_value = || variables.iter().filter(|(_, value)| !value.is_empty());
        self.names_of_variables = with_value().map(|(name, _)| name.clone()).collect();
        for (name, value) in with_value() {
            if let Some(key) = KEYS.iter().find(|key| key.also == Some(name)) {
                self.put(key, vec![value.clone()], name.clone());
            }
        }
    }

    fn take_variables(&mut self, variables: &BTreeMap<String, String>) {
        for (name, value) in variables {
            if OTHER_VARIABLES.iter().any(|other| name.starts_with(other)) || is_service_link(name, value) {
                continue;
            }
            match KEYS.iter().find(|key| key.variable() == *name) {
                Some(key) if key.many => {
                    let values =
                        value.split(',').map(|part| part.trim().to_owned()).filter(|part| !part.is_empty());
                    self.put(key, values.collect(), name.clone());
                }
                Some(key) => self.put(key, vec![value.clone()], name.clone()),
                None => self
                    .mistakes
                    .push(format!("{name}: no such setting; `weft-sidecar run --help` lists them")),
            }
        }
    }

    fn take_file(&mut self, path: &Path) {
        match read_small(path) {
            Ok(text) => self.take_text(&path.display().to_string(), &text),
            Err(error) => self.mistakes.push(format!("{}: cannot be read: {error}", path.display())),
        }
    }

    fn take_text(&mut self, shown: &str, text: &str) {
        let document: BTreeMap<String, Spanned<serde_json::Value>> = match serde_saphyr::from_str(text) {
            Ok(document) => document,
            Err(error) => {
                let line =
                    error.location().map(|location| format!(":{}", location.line())).unwrap_or_default();
                return self.mistakes.push(format!("{shown}{line}: {}", first_line(&error.to_string())));
            }
        };
        for (name, value) in document {
            let place = format!("{shown}:{}", value.referenced.line());
            let Some(key) = KEYS.iter().find(|key| key.name == name) else {
                self.mistakes
                    .push(format!("{place}: `{name}` is no setting; `weft-sidecar run --help` lists them"));
                continue;
            };
            match texts(&value.value) {
                Some(values) if values.len() == 1 || key.many => self.put(key, values, place),
                _ => {
                    let expected = if key.many { "a value or a list of values" } else { "one value" };
                    self.mistakes.push(format!("{place}: `{name}`: expected {expected}"));
                }
            }
        }
    }

    fn put(&mut self, key: &Key, values: Vec<String>, place: String) {
        self.entries.entry(key.name).or_insert(Entry { values, place });
    }
}

/// Variables that Kubernetes writes into every container for a Service, here one called `weft` or `weft-…`:
/// <https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables>. Those that could be settings
/// by their names (`WEFT_PORT`) have a URL as their value.
fn is_service_link(name: &str, value: &str) -> bool {
    const PROTOCOLS: [&str; 3] = ["TCP", "UDP", "SCTP"];
    let is_url =
        PROTOCOLS.iter().any(|protocol| value.starts_with(&format!("{}://", protocol.to_lowercase())));
    if name.ends_with("_PORT") && is_url {
        return true;
    }
    if name.ends_with("_SERVICE_HOST") || name.ends_with("_SERVICE_PORT") || name.contains("_SERVICE_PORT_") {
        return true;
    }
    // WEFT_CA_PORT_15080_TCP and the same with _PROTO, _PORT, _ADDR
    let Some((_, rest)) = name.rsplit_once("_PORT_").or_else(|| name.split_once("_PORT_")) else {
        return false;
    };
    let mut words = rest.split('_');
    let number = words.next().is_some_and(|word| word.parse::<u16>().is_ok());
    number && words.next().is_some_and(|word| PROTOCOLS.contains(&word))
}

fn read_small(path: &Path) -> std::io::Result<String> {
    let size = std::fs::metadata(path)?.len();
    if size > MAX_FILE_BYTES {
        return Err(std::io::Error::other(format!("{size} bytes; expected at most {MAX_FILE_BYTES}")));
    }
    std::fs::read_to_string(path)
}

/// A scalar, or a list of scalars, as text.
fn texts(value: &serde_json::Value) -> Option<Vec<String>> {
    match value {
        serde_json::Value::Array(items) => items.iter().map(scalar).collect(),
        other => scalar(other).map(|text| vec![text]),
    }
}

fn scalar(value: &serde_json::Value) -> Option<String> {
    match value {
        serde_json::Value::String(text) => Some(text.clone()),
        serde_json::Value::Number(number) => Some(number.to_string()),
        serde_json::Value::Bool(truth) => Some(truth.to_string()),
        _ => None,
    }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

impl fmt::Display for InvalidSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.len();
        writeln!(f, "the settings have {count} {}:", if count == 1 { "mistake" } else { "mistakes" })?;
        self.0.iter().try_for_each(|mistake| writeln!(f, "  {mistake}"))
    }
}

impl std::error::Error for InvalidSettings {}
