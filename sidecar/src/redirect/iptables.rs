//! The iptables programs of the system: which of the two kinds, `nft` or `legacy`, and running its `-save` and
//! `-restore`. Errors carry what the program said, the line it meant, and what to do. It decides no rule.

use std::{
    env,
    ffi::OsStr,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;

use super::rules::{Family, Rules};

/// Where system programs are that an ordinary user's `PATH` often lacks.
const SYSTEM_FOLDERS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];
/// Seconds to wait for another program that changes rules (iptables-legacy has one lock for all).
const LOCK_WAIT: &str = "20";

/// Which iptables to use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// The one that already has rules, else nft, else legacy.
    #[default]
    Auto,
    /// `iptables-nft`: rules in nf_tables.
    Nft,
    /// `iptables-legacy`: rules in ip_tables.
    Legacy,
}

impl Backend {
    /// As in the names of the programs.
    pub fn label(self) -> &'static str {
        match self {
            Backend::Auto => "auto",
            Backend::Nft => "nft",
            Backend::Legacy => "legacy",
        }
    }
}

/// One kind of iptables, ready to use.
#[derive(Debug, Clone)]
pub(super) struct Tools {
    /// `Nft` or `Legacy`.
    pub(super) backend: Backend,
    lock_file: Option<PathBuf>,
}

/// What a kind of iptables has in the first place, read over IPv4.
enum State {
    Unusable(anyhow::Error),
    Empty,
    RulesOfOthers,
    Ours,
}

impl Tools {
    /// Chooses. With [`Backend::Auto`]: the kind that has our rules, else the one that has any, else nft, else
    /// legacy.
    ///
    /// # Errors
    /// If the chosen programs are missing or the kernel refuses them; for `Auto` if that is so for both.
    pub(super) fn choose(backend: Backend) -> Result<Tools> {
        if backend != Backend::Auto {
            let tools = Tools { backend, lock_file: None };
            tools.saved(Family::Ipv4)?;
            return Ok(tools);
        }
        let [nft, legacy] = [Backend::Nft, Backend::Legacy].map(|backend| Tools { backend, lock_file: None });
        match (nft.state(), legacy.state()) {
            (State::Unusable(nft_error), State::Unusable(legacy_error)) => {
                bail!("no iptables works here.\nnft: {nft_error:#}\nlegacy: {legacy_error:#}")
            }
            (State::Ours, _) => Ok(nft),
            (_, State::Ours) | (State::Unusable(_), _) | (State::Empty, State::RulesOfOthers) => Ok(legacy),
            _ => Ok(nft),
        }
    }

    /// Every kind whose programs are there and work.
    pub(super) fn all() -> Vec<Tools> {
        [Backend::Nft, Backend::Legacy]
            .map(|backend| Tools { backend, lock_file: None })
            .into_iter()
            .filter(|tools| !matches!(tools.state(), State::Unusable(_)))
            .collect()
    }

    /// The same with another lock file: iptables-legacy wants one it may write to.
    pub(super) fn with_lock_file(self, path: &Path) -> Tools {
        Tools { lock_file: Some(path.to_owned()), ..self }
    }

    /// What `iptables-save` prints.
    ///
    /// # Errors
    /// If the program is missing or fails.
    pub(super) fn saved(&self, family: Family) -> Result<String> {
        let name = self.program(family, "save");
        let mut command = self.command(&name)?;
        let output = command.output().with_context(|| format!("cannot start {name}"))?;
        if !output.status.success() {
            return Err(failure(&name, &output, ""));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Our rules that are present.
    ///
    /// # Errors
    /// As [`Tools::saved`].
    pub(super) fn present(&self, family: Family) -> Result<Rules> {
        Ok(Rules::in_saved(&self.saved(family)?))
    }

    /// Hands a document to `iptables-restore --noflush`: all of a table or nothing.
    ///
    /// # Errors
    /// If the program is missing or refuses the document.
    pub(super) fn restore(&self, family: Family, document: &str) -> Result<()> {
        if document.is_empty() {
            return Ok(());
        }
        let name = self.program(family, "restore");
        let mut child = self
            .command(&name)?
            .args(["--noflush", "--wait", LOCK_WAIT])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        if let Some(mut stdin) = child.stdin.take() {
            // if it stops reading early its exit status tells why
            let _ = stdin.write_all(document.as_bytes());
        }
        let output = child.wait_with_output().with_context(|| format!("cannot wait for {name}"))?;
        if output.status.success() { Ok(()) } else { Err(failure(&name, &output, document)) }
    }

    fn state(&self) -> State {
        match self.saved(Family::Ipv4) {
            Err(error) => State::Unusable(error),
            Ok(saved) if !Rules::in_saved(&saved).is_empty() => State::Ours,
            Ok(saved) if saved.lines().any(|line| line.starts_with("-A ")) => State::RulesOfOthers,
            Ok(_) => State::Empty,
        }
    }

    fn program(&self, family: Family, verb: &str) -> String {
        let stem = match family {
            Family::Ipv4 => "iptables",
            Family::Ipv6 => "ip6tables",
        };
        format!("{stem}-{}-{verb}", self.backend.label())
    }

    fn command(&self, name: &str) -> Result<Command> {
        let mut command = Command::new(find_program(name, "iptables")?);
        command.stdin(Stdio::null());
        if let Some(path) = &self.lock_file {
            command.env("XTABLES_LOCKFILE", path);
        }
        Ok(command)
    }
}

/// Where a system program is.
///
/// # Errors
/// If it is missing; the error names the Debian package that has it.
pub(super) fn find_program(name: &str, package: &str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(SYSTEM_FOLDERS.map(PathBuf::from));
    folders.map(|folder| folder.join(OsStr::new(name))).find(|program| program.is_file()).ok_or_else(|| {
        anyhow!("the program `{name}` is missing; on Debian and Ubuntu: apt-get install {package}")
    })
}

/// What a program that failed said, made useful.
fn failure(name: &str, output: &Output, document: &str) -> anyhow::Error {
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim();
    let mut text = format!("{name} failed ({}): {said}", output.status);
    if let Some(line) = line_meant(said).and_then(|number| document.lines().nth(number.checked_sub(1)?)) {
        text.push_str(&format!("\n  it meant: {line}"));
    }
    if let Some(advice) = advice(said) {
        text.push_str("\n  ");
        text.push_str(advice);
    }
    anyhow!(text)
}

/// The number in "line 7 failed" or "Error occurred at line: 7".
fn line_meant(said: &str) -> Option<usize> {
    let (_, rest) = said.rsplit_once("line")?;
    let digits: String =
        rest.trim_start_matches([':', ' ']).chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

fn advice(said: &str) -> Option<&'static str> {
    if said.contains("Permission denied") || said.contains("Operation not permitted") {
        Some(
            "It takes the capabilities NET_ADMIN and NET_RAW in this network namespace: run as root, or in \
             Kubernetes give the init container `capabilities: {add: [NET_ADMIN, NET_RAW]}`.",
        )
    } else if said.contains("lock") {
        Some(
            "Another program is changing rules, or the lock file is not writable (XTABLES_LOCKFILE names it).",
        )
    } else if said.contains("Table does not exist")
        || said.contains("does not exist")
        || said.contains("No chain")
    {
        Some(
            "The kernel may lack a module (nf_nat, xt_REDIRECT, xt_owner, xt_CT, xt_conntrack, xt_addrtype; for IPv6 \
             ip6table_nat): load it on the host, choose the other backend, or turn IPv6 or DNS off.",
        )
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_that_a_program_meant() {
        for (said, number) in [
            ("iptables-restore: line 7 failed", Some(7)),
            ("iptables-restore v1.8.9 (nf_tables): x\nError occurred at line: 12\nTry `-h`", Some(12)),
            ("nothing to see", None),
            ("the line is long", None),
        ] {
            assert_eq!(line_meant(said), number, "{said}");
        }
    }

    #[test]
    fn a_missing_program_names_its_package() {
        let error = find_program("iptables-of-nobody", "iptables").unwrap_err().to_string();
        assert!(error.contains("apt-get install iptables"), "{error}");
    }
}
