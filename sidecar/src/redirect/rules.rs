//! iptables rules as data: tables, our `WEFT_*` chains, and the jumps into them; read from `iptables-save` and
//! written as one `iptables-restore --noflush` document. What others wrote is neither read nor touched.

use std::fmt::Write;

use serde::Serialize;

/// Every chain of ours begins with this, and no other does.
const PREFIX: &str = "WEFT_";

/// IPv4 or IPv6: each has its own tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Rules of `iptables`.
    Ipv4,
    /// Rules of `ip6tables`.
    Ipv6,
}

impl Family {
    /// As written in texts for people.
    pub fn label(self) -> &'static str {
        match self {
            Family::Ipv4 => "IPv4",
            Family::Ipv6 => "IPv6",
        }
    }
}

/// Our rules of one family.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Rules {
    /// Only tables in which something of ours stands.
    pub tables: Vec<Table>,
}

/// Our part of one table.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Table {
    /// `nat`, `raw` or `mangle`.
    pub name: String,
    /// Chains of ours.
    pub chains: Vec<Chain>,
    /// Where foreign chains lead into ours, in order; they stand before the rules of others.
    pub jumps: Vec<Jump>,
}

/// A chain of ours.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Chain {
    /// Begins with `WEFT_`.
    pub name: String,
    /// Matches and target of each rule, as after `iptables -A CHAIN`.
    pub rules: Vec<String>,
}

/// A rule in a built-in chain that leads into a chain of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Jump {
    /// The built-in chain, such as `OUTPUT`.
    pub from: String,
    /// Matches and target, as after `iptables -A CHAIN`.
    pub rule: String,
}

impl Rules {
    /// Finds what is ours in the output of `iptables-save`.
    pub fn in_saved(saved: &str) -> Rules {
        let mut tables: Vec<Table> = Vec::new();
        for line in saved.lines() {
            if let Some(name) = line.strip_prefix('*') {
                tables.push(Table { name: name.trim().to_owned(), ..Table::default() });
            } else if let Some(table) = tables.last_mut() {
                table.read_line(line);
            }
        }
        tables.retain(|table| !table.is_empty());
        Rules { tables }
    }

    /// Is nothing of ours there?
    pub fn is_empty(&self) -> bool {
        self.tables.iter().all(Table::is_empty)
    }

    /// The document that replaces what is present of ours with exactly these rules, whatever stood there: one
    /// transaction per table with iptables-legacy, one for all with iptables-nft. Written for
    /// `iptables-restore --noflush`, where naming a chain makes or empties it.
    pub fn document(&self, present: &Rules) -> String {
        let nothing = Table::default();
        let mut text = String::new();
        for table in &self.tables {
            table.write(present.table(&table.name).unwrap_or(&nothing), &mut text);
        }
        for old in present.tables.iter().filter(|old| self.table(&old.name).is_none()) {
            Table { name: old.name.clone(), ..Table::default() }.write(old, &mut text);
        }
        text
    }

    /// The part in one table.
    pub fn table(&self, name: &str) -> Option<&Table> {
        self.tables.iter().find(|table| table.name == name)
    }
}

impl Table {
    /// The chain of that name.
    pub fn chain(&self, name: &str) -> Option<&Chain> {
        self.chains.iter().find(|chain| chain.name == name)
    }

    fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.jumps.is_empty()
    }

    fn read_line(&mut self, line: &str) {
        if let Some(chain) = line.strip_prefix(':') {
            let name = chain.split_whitespace().next().unwrap_or_default();
            if name.starts_with(PREFIX) {
                self.chains.push(Chain { name: name.to_owned(), rules: Vec::new() });
            }
        } else if let Some((chain, rule)) = line.strip_prefix("-A ").and_then(|rest| rest.split_once(' ')) {
            if let Some(ours) = self.chains.iter_mut().find(|ours| ours.name == chain) {
                ours.rules.push(rule.to_owned());
            } else if leads_to_us(rule) {
                self.jumps.push(Jump { from: chain.to_owned(), rule: rule.to_owned() });
            }
        }
    }

    fn write(&self, present: &Table, text: &mut String) {
        let stale: Vec<&Chain> =
            present.chains.iter().filter(|old| self.chain(&old.name).is_none()).collect();
        let mut line = |line: std::fmt::Arguments<'_>| {
            let _ = writeln!(text, "{line}");
        };
        line(format_args!("*{}", self.name));
        for chain in self.chains.iter().chain(stale.iter().copied()) {
            line(format_args!(":{} - [0:0]", chain.name));
        }
        for jump in &present.jumps {
            line(format_args!("-D {} {}", jump.from, jump.rule));
        }
        for chain in stale {
            line(format_args!("-X {}", chain.name));
        }
        // each goes to the top, so the last one first
        for jump in self.jumps.iter().rev() {
            line(format_args!("-I {} 1 {}", jump.from, jump.rule));
        }
        for chain in &self.chains {
            for rule in &chain.rules {
                line(format_args!("-A {} {rule}", chain.name));
            }
        }
        line(format_args!("COMMIT"));
    }
}

fn leads_to_us(rule: &str) -> bool {
    let mut words = rule.split_whitespace();
    while let Some(word) = words.next() {
        if matches!(word, "-j" | "-g" | "--jump" | "--goto") {
            return words.next().is_some_and(|target| target.starts_with(PREFIX));
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "\
# Generated by iptables-save
*raw
:PREROUTING ACCEPT [1:60]
:OUTPUT ACCEPT [0:0]
COMMIT
*nat
:OUTPUT ACCEPT [5:300]
:DOCKER_OUTPUT - [0:0]
:WEFT_OLD - [0:0]
:WEFT_OUTPUT - [0:0]
-A OUTPUT -j WEFT_OUTPUT
-A OUTPUT -d 127.0.0.11/32 -j DOCKER_OUTPUT
-A OUTPUT -p tcp -m comment --comment \"-j WEFT_ is only a comment\" -j ACCEPT
-A WEFT_OUTPUT -m owner --uid-owner 1337 -j RETURN
-A WEFT_OUTPUT -j WEFT_OLD
COMMIT
";

    #[test]
    fn only_what_is_ours_is_found() {
        let rules = Rules::in_saved(SAVED);
        assert_eq!(rules.tables.len(), 1);
        let nat = rules.table("nat").unwrap();
        assert_eq!(nat.jumps, [Jump { from: "OUTPUT".to_owned(), rule: "-j WEFT_OUTPUT".to_owned() }]);
        assert_eq!(nat.chain("WEFT_OUTPUT").unwrap().rules.len(), 2);
        assert!(nat.chain("WEFT_OLD").unwrap().rules.is_empty());
        assert!(Rules::in_saved("").is_empty());
    }

    #[test]
    fn replacing_removes_what_is_stale_and_nothing_else() {
        let present = Rules::in_saved(SAVED);
        let wanted = Rules {
            tables: vec![Table {
                name: "nat".to_owned(),
                chains: vec![Chain { name: "WEFT_OUTPUT".to_owned(), rules: vec!["-j RETURN".to_owned()] }],
                jumps: vec![Jump { from: "OUTPUT".to_owned(), rule: "-p tcp -j WEFT_OUTPUT".to_owned() }],
            }],
        };
        assert_eq!(
            wanted.document(&present),
            "*nat\n:WEFT_OUTPUT - [0:0]\n:WEFT_OLD - [0:0]\n-D OUTPUT -j WEFT_OUTPUT\n-X WEFT_OLD\n\
             -I OUTPUT 1 -p tcp -j WEFT_OUTPUT\n-A WEFT_OUTPUT -j RETURN\nCOMMIT\n"
        );
        assert_eq!(
            Rules::default().document(&present),
            "*nat\n:WEFT_OLD - [0:0]\n:WEFT_OUTPUT - [0:0]\n-D OUTPUT -j WEFT_OUTPUT\n-X WEFT_OLD\n\
             -X WEFT_OUTPUT\nCOMMIT\n"
        );
        assert_eq!(Rules::default().document(&Rules::default()), "");
    }
}
