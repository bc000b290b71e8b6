//! Who may have DNS names in its certificate, and which: a server that is called from outside of the mesh, where callers
//! know DNS names and no identities, as the API server of Kubernetes calls an admission webhook.
//!
//! It gets the names of the Service that is called like its service account, in its own namespace, and no others; only
//! where the operator has named its identity; and only by the token of its service account: neither a join token nor a
//! certificate is enough, so that every such certificate leads back to a pod that the cluster vouches for. Pure.

use anyhow::{Result, bail};
use weft_proto::spiffe::{SpiffeId, TrustDomain};

/// How a caller has proven its identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// By the token of a service account, which the cluster has reviewed.
    ServiceAccount,
    /// By a join token or by a certificate.
    Other,
}

/// Names that an identity can have.
pub const MAX_NAMES: usize = 4;
/// RFC 1035 section 2.3.4.
const MAX_LABEL: usize = 63;

/// May this caller have these names? The reason of a refusal is for the caller too.
///
/// # Errors
/// Why it gets none.
pub fn check(id: &SpiffeId, proof: Proof, asked: &[String], allowed: &[SpiffeId]) -> Result<(), String> {
    if asked.is_empty() {
        return Ok(());
    }
    if !allowed.contains(id) {
        return Err(format!("{id} gets no DNS names: no --serving-identity of the authority names it"));
    }
    if proof != Proof::ServiceAccount {
        return Err("DNS names are given by the token of a service account alone".to_owned());
    }
    let own = names_of(id);
    for (at, name) in asked.iter().enumerate() {
        if !own.contains(name) {
            let shown: String = name.chars().take(253).flat_map(char::escape_default).collect();
            return Err(format!(
                "{id} does not get the DNS name {shown}; expected one of: {}",
                own.join(", ")
            ));
        }
        if asked[..at].contains(name) {
            return Err(format!("the DNS name {name} is asked for twice"));
        }
    }
    Ok(())
}

/// The names of the Service that is called like the service account.
fn names_of(id: &SpiffeId) -> [String; MAX_NAMES] {
    let (service, namespace) = (id.service_account(), id.namespace());
    [
        service.to_owned(),
        format!("{service}.{namespace}"),
        format!("{service}.{namespace}.svc"),
        format!("{service}.{namespace}.svc.cluster.local"),
    ]
}

/// Can the operator name this identity? A service account with a dot could have the name of a Service of another namespace.
///
/// # Errors
/// Why not.
pub fn check_identity(id: &SpiffeId, trust_domain: &TrustDomain) -> Result<()> {
    if id.trust_domain() != trust_domain.as_str() {
        bail!("--serving-identity {id} is not of this authority's trust domain, {trust_domain}");
    }
    if id.is_authority() {
        bail!("--serving-identity {id} is the authority itself; nobody gets that identity");
    }
    for part in [id.namespace(), id.service_account()] {
        if !is_label(part) {
            bail!(
                "--serving-identity {id}: {part} is not the name of a Service or a namespace; expected a-z, 0-9 and -"
            );
        }
    }
    Ok(())
}

/// A label of DNS as Kubernetes takes it (RFC 1123).
fn is_label(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    text.len() <= MAX_LABEL && text.bytes().all(allowed) && !text.starts_with('-') && !text.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    const INJECTOR: &str = "spiffe://weft.local/ns/weft-system/sa/weft-injector";
    const WEB: &str = "spiffe://weft.local/ns/shop/sa/web";

    #[test]
    fn names_are_given_to_named_identities_by_service_account_for_their_own_service() {
        let all = [
            "weft-injector",
            "weft-injector.weft-system",
            "weft-injector.weft-system.svc",
            "weft-injector.weft-system.svc.cluster.local",
        ];
        let svc = &all[2..3];
        let (account, other) = (Proof::ServiceAccount, Proof::Other);
        let cases: [(&str, Proof, &[&str], Option<&str>); 13] = [
            (INJECTOR, account, &[], None),
            (INJECTOR, other, &[], None),
            (WEB, other, &[], None),
            (INJECTOR, account, svc, None),
            (INJECTOR, account, &all, None),
            (INJECTOR, other, svc, Some("token of a service account")),
            (WEB, account, &["web.shop.svc"], Some("no --serving-identity")),
            (WEB, account, svc, Some("no --serving-identity")),
            (INJECTOR, account, &["web.shop.svc"], Some("does not get the DNS name web.shop.svc")),
            (INJECTOR, account, &[all[2], "kubernetes.default.svc"], Some("kubernetes.default.svc")),
            (INJECTOR, account, &["*.weft-system.svc"], Some("does not get")),
            (INJECTOR, account, &["weft-injector.weft-system.svc."], Some("does not get")),
            (INJECTOR, account, &[all[2], all[2]], Some("twice")),
        ];
        for (id, proof, asked, refused) in cases {
            let asked: Vec<String> = asked.iter().map(|&name| name.to_owned()).collect();
            let outcome = check(&id.parse().unwrap(), proof, &asked, &[INJECTOR.parse().unwrap()]);
            match (outcome, refused) {
                (Ok(()), None) => {}
                (Err(why), Some(part)) if why.contains(part) => {}
                (outcome, refused) => panic!("{id} {proof:?} {asked:?}: {outcome:?}, expected {refused:?}"),
            }
        }
    }

    #[test]
    fn an_identity_that_names_no_service_is_refused_at_the_start() {
        let domain = "weft.local".parse().unwrap();
        assert!(check_identity(&INJECTOR.parse().unwrap(), &domain).is_ok());
        for (id, reason) in [
            ("spiffe://other/ns/weft-system/sa/weft-injector", "trust domain"),
            ("spiffe://weft.local/ns/weft/sa/weft-ca", "authority itself"),
            ("spiffe://weft.local/ns/svc/sa/kubernetes.default", "not the name of a Service"),
            ("spiffe://weft.local/ns/Shop/sa/web", "not the name of a Service"),
            ("spiffe://weft.local/ns/shop/sa/-web", "not the name of a Service"),
        ] {
            let error = check_identity(&id.parse().unwrap(), &domain).unwrap_err().to_string();
            assert!(error.contains(reason), "{id}: {error}");
        }
    }
}
