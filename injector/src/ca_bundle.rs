//! The CA bundle of the webhook configuration: the roots by which the API server recognises the webhook. It follows the
//! authority's roots. Every replica writes it; the same write twice changes nothing.
//!
//! Roots that others have written are kept for a while: while the authority's root changes, another replica may still serve
//! with a certificate of the old one.

use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::{ByteString, api::admissionregistration::v1::MutatingWebhookConfiguration};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use serde_json::json;
use tokio::time::sleep;

/// May roots that are not ours be removed?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Others {
    /// Another replica may need them.
    Keep,
    /// Long enough since our own roots have changed.
    Remove,
}

/// More roots than a change of the authority needs.
const MAX_OTHERS: usize = 16;
/// Replicas may write at the same time; the API server takes one of them.
const ATTEMPTS: usize = 3;
const PAUSE: Duration = Duration::from_millis(300);

/// Writes the roots into the configuration of this name, where they differ. Says whether they did.
///
/// # Errors
/// It cannot be read or written.
pub async fn write(
    client: &Client,
    name: &str,
    roots: &[CertificateDer<'static>],
    others: Others,
) -> Result<bool> {
    let api = Api::<MutatingWebhookConfiguration>::all(client.clone());
    for left in (0..ATTEMPTS).rev() {
        let found = api.get(name).await;
        let configuration = found.with_context(|| format!("MutatingWebhookConfiguration {name}"))?;
        let Some(patch) = patch(&configuration, roots, others)? else { return Ok(false) };
        match api.patch(name, &PatchParams::default(), &Patch::<()>::Json(patch)).await {
            Ok(_) => return Ok(true),
            Err(error) if left == 0 => {
                return Err(error).with_context(|| format!("MutatingWebhookConfiguration {name}"));
            }
            Err(_) => sleep(PAUSE).await,
        }
    }
    Ok(false)
}

/// The change of the configuration; none where all its webhooks have the roots. It fails at the API server where somebody
/// else has changed the configuration since.
fn patch(
    configuration: &MutatingWebhookConfiguration,
    roots: &[CertificateDer<'static>],
    others: Others,
) -> Result<Option<json_patch::Patch>> {
    let version = &configuration.metadata.resource_version;
    let mut operations = vec![json!({ "op": "test", "path": "/metadata/resourceVersion", "value": version })];
    for (at, webhook) in configuration.webhooks.iter().flatten().enumerate() {
        let current = webhook.client_config.ca_bundle.as_ref().map_or(&[][..], |bundle| &bundle.0);
        if let Some(bundle) = changed(current, roots, others) {
            let path = format!("/webhooks/{at}/clientConfig/caBundle");
            operations.push(json!({ "op": "add", "path": path, "value": ByteString(bundle.into_bytes()) }));
        }
    }
    if operations.len() == 1 {
        return Ok(None);
    }
    Ok(Some(serde_json::from_value(operations.into())?))
}

/// What a CA bundle must be instead; none where it is right. What is no certificate in it is not kept.
fn changed(current: &[u8], roots: &[CertificateDer<'static>], others: Others) -> Option<String> {
    let read: Result<Vec<CertificateDer<'static>>, _> = CertificateDer::pem_slice_iter(current).collect();
    let damaged = read.is_err();
    let current = read.unwrap_or_default();
    let mut wanted = roots.to_vec();
    if others == Others::Keep {
        let foreign = current.iter().filter(|root| !roots.contains(root)).take(MAX_OTHERS);
        wanted.extend(foreign.cloned());
    }
    let same = current.len() == wanted.len() && wanted.iter().all(|root| current.contains(root));
    (damaged || !same).then(|| pem(&wanted))
}

fn pem(roots: &[CertificateDer<'static>]) -> String {
    let one = |root: &CertificateDer<'_>| pem::Pem::new("CERTIFICATE", root.to_vec());
    pem::encode_many(&roots.iter().map(one).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(name: &str) -> CertificateDer<'static> {
        CertificateDer::from(name.as_bytes().to_vec())
    }

    #[test]
    fn a_bundle_is_written_where_it_differs_and_others_are_kept_for_a_while() {
        let [a, b, c] = ["a", "b", "c"].map(root);
        let of = |roots: &[&CertificateDer<'static>]| {
            pem(&roots.iter().map(|&root| root.clone()).collect::<Vec<_>>())
        };
        let (keep, remove) = (Others::Keep, Others::Remove);
        let cases = [
            // the bundle, our roots, others, what it must be
            (String::new(), vec![&a], keep, Some(of(&[&a]))),
            (of(&[&a]), vec![&a], keep, None),
            (of(&[&a]), vec![&a], remove, None),
            (of(&[&b, &a]), vec![&a, &b], remove, None),
            (of(&[&a]), vec![&a, &b], keep, Some(of(&[&a, &b]))),
            (of(&[&a]), vec![&b], keep, Some(of(&[&b, &a]))),
            (of(&[&b, &a]), vec![&b], keep, None),
            (of(&[&b, &a]), vec![&b], remove, Some(of(&[&b]))),
            (of(&[&a, &c]), vec![&b], remove, Some(of(&[&b]))),
            ("-----BEGIN CERTIFICATE-----\n!".to_owned(), vec![&a], keep, Some(of(&[&a]))),
            ("no PEM".to_owned(), vec![&a], keep, Some(of(&[&a]))),
        ];
        for (current, roots, others, expected) in cases {
            let roots: Vec<_> = roots.into_iter().cloned().collect();
            assert_eq!(changed(current.as_bytes(), &roots, others), expected, "{current} {others:?}");
        }
    }

    #[test]
    fn only_webhooks_that_differ_are_patched_and_only_as_they_were_read() {
        let a = root("a");
        let bundle = ByteString(pem(std::slice::from_ref(&a)).into_bytes());
        let webhook = |config: serde_json::Value| json!({ "name": "x.weft.dev", "admissionReviewVersions": ["v1"], "sideEffects": "None", "clientConfig": config });
        let configuration = |webhooks: serde_json::Value| -> MutatingWebhookConfiguration {
            serde_json::from_value(json!({ "metadata": { "resourceVersion": "7" }, "webhooks": webhooks }))
                .unwrap()
        };
        let [right, empty] = [json!({ "caBundle": bundle }), json!({})].map(webhook);
        let patch = |webhooks| {
            super::patch(&configuration(webhooks), std::slice::from_ref(&a), Others::Keep).unwrap()
        };
        assert!(patch(json!([right, right])).is_none());
        assert!(patch(json!([])).is_none());
        assert_eq!(
            serde_json::to_value(patch(json!([right, empty])).unwrap()).unwrap(),
            json!([
                { "op": "test", "path": "/metadata/resourceVersion", "value": "7" },
                { "op": "add", "path": "/webhooks/1/clientConfig/caBundle", "value": bundle },
            ])
        );
    }
}
