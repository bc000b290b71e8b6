use super::*;

struct Home {
    _outer: tempfile::TempDir,
    directory: Directory,
    now: SystemTime,
}

fn home() -> (Home, Authority) {
    let outer = tempfile::tempdir().unwrap();
    let directory = Directory::create(&outer.path().join("d")).unwrap();
    let now = SystemTime::now();
    let authority = Authority::init(&directory, "weft.local".parse().unwrap(), now).unwrap();
    (Home { _outer: outer, directory, now }, authority)
}

fn request() -> Request {
    Request { public_key: KeyPair::generate().unwrap().subject_public_key_info() }
}

fn web() -> SpiffeId {
    "spiffe://weft.local/ns/shop/sa/web".parse().unwrap()
}

const DAY: Duration = Duration::from_secs(24 * 3600);

#[test]
fn a_restart_keeps_root_and_issuing_certificate() {
    let (home, authority) = home();
    let loaded = Authority::load(&home.directory, home.now).unwrap();
    assert_eq!(loaded.root(), authority.root());
    assert_eq!(loaded.issuing.certificate, authority.issuing.certificate);
    assert_eq!(loaded.trust_domain().as_str(), "weft.local");
    assert_eq!(loaded.root_sha256().len(), 64);
}

#[test]
fn a_missing_or_damaged_root_is_an_error_and_never_made_anew() {
    for name in [ROOT_FILE, ROOTS_FILE] {
        let (home, _) = home();
        home.directory.remove(name).unwrap();
        let error = format!("{:#}", Authority::load(&home.directory, home.now).err().unwrap());
        assert!(error.contains(name) && error.contains("backup"), "{error}");
        assert!(home.directory.read(name).unwrap().is_none(), "{name} was made anew");
        home.directory.write(name, b"not PEM").unwrap();
        let error = format!("{:#}", Authority::load(&home.directory, home.now).err().unwrap());
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn an_issuing_certificate_that_cannot_be_used_is_signed_anew_from_the_root() {
    let ((other, _), certificate_without_key) = (home(), b"-----BEGIN CERTIFICATE-----\n");
    let foreign = other.directory.read(ISSUING_FILE).unwrap();
    for bad in [None, Some(b"not PEM".to_vec()), Some(certificate_without_key.to_vec()), foreign] {
        let (home, authority) = home();
        home.directory.remove(ISSUING_FILE).unwrap();
        if let Some(bytes) = &bad {
            home.directory.write(ISSUING_FILE, bytes).unwrap();
        }
        let loaded = Authority::load(&home.directory, home.now).unwrap();
        assert_eq!(loaded.root(), authority.root());
        assert!(loaded.sign(&request(), &web(), &[], DAY, home.now).is_ok());
        let again = Authority::load(&home.directory, home.now).unwrap();
        assert_eq!(again.issuing.certificate, loaded.issuing.certificate, "the new one was kept");
    }
}

#[test]
fn what_a_command_reads_mends_nothing() {
    for bad in [None, Some(b"not PEM")] {
        let (home, authority) = home();
        home.directory.remove(ISSUING_FILE).unwrap();
        if let Some(bytes) = bad {
            home.directory.write(ISSUING_FILE, bytes).unwrap();
        }
        let known = Known::read(&home.directory, home.now).unwrap();
        assert_eq!((known.root_sha256, known.issuing_not_after), (authority.root_sha256(), None));
        assert_eq!(home.directory.read(ISSUING_FILE).unwrap().as_deref(), bad.map(|bytes| &bytes[..]));
    }
    let (home, authority) = home();
    let known = Known::read(&home.directory, home.now).unwrap();
    assert_eq!(known.issuing_not_after, Some(authority.issuing_not_after()));
}

#[test]
fn the_wrong_root_in_a_directory_replaces_no_issuing_certificate() {
    for name in [ROOT_FILE, ROOTS_FILE] {
        let ((home, _), (other, _)) = (self::home(), self::home());
        let before = home.directory.read(ISSUING_FILE).unwrap();
        let foreign = other.directory.read(name).unwrap().unwrap();
        home.directory.write(name, &foreign).unwrap();
        assert!(Authority::load(&home.directory, home.now).is_err(), "{name} of another authority");
        assert_eq!(home.directory.read(ISSUING_FILE).unwrap(), before);
    }
}

#[test]
fn a_clock_that_was_ahead_leaves_no_issuing_certificate_of_the_future() {
    let (home, authority) = home();
    let ahead = home.now + 50 * DAY;
    assert!(authority.issuing_is_due(ahead));
    let future = authority.renew_issuing(&home.directory, ahead).unwrap();
    assert!(future.check_time(ahead).is_ok() && future.check_time(home.now).is_err());
    assert!(future.sign(&request(), &web(), &[], DAY, home.now).is_err());

    // The running authority sees that it is due, and a start does not need to be told.
    assert!(future.issuing_is_due(home.now));
    let started = Authority::load(&home.directory, home.now).unwrap();
    assert!(started.sign(&request(), &web(), &[], DAY, home.now).is_ok());
    let renewed = future.renew_issuing(&home.directory, home.now).unwrap();
    assert!(renewed.sign(&request(), &web(), &[], DAY, home.now).is_ok());
    assert!(!renewed.issuing_is_due(home.now));
}

#[test]
fn outside_the_life_of_the_root_nothing_is_signed_or_replaced() {
    let (home, authority) = home();
    let before = home.directory.read(ISSUING_FILE).unwrap();
    for (wrong, reason) in
        [(authority.root.not_before - DAY, "valid from"), (authority.root.not_after, "expired")]
    {
        let errors = [
            authority.renew_issuing(&home.directory, wrong).err().unwrap(),
            Authority::load(&home.directory, wrong).err().unwrap(),
            authority.check_time(wrong).unwrap_err(),
        ];
        for error in errors {
            let error = format!("{error:#}");
            assert!(error.contains(reason) && error.contains("the clock"), "{error}");
        }
    }
    assert_eq!(home.directory.read(ISSUING_FILE).unwrap(), before);
}

#[test]
fn a_workload_gets_exactly_what_it_may_have() {
    let (home, authority) = home();
    let request = request();
    let issued = authority.sign(&request, &web(), &[], DAY, home.now).unwrap();
    assert_eq!(issued.leaf.id, web());
    assert_eq!(issued.leaf.public_key, request.public_key);
    assert!(issued.leaf.not_after <= home.now + DAY && issued.leaf.not_after > home.now + DAY / 2);
    assert!(issued.leaf.not_before < home.now);
    let parsed = read(&issued.chain[0]).unwrap();
    assert!(parsed.subject().as_raw().len() == 2, "an empty subject");
    assert!(parsed.subject_alternative_name().unwrap().unwrap().critical);
    // X509-SVID 4.1 lets a leaf leave it out; some libraries refuse one that does.
    assert!(!parsed.basic_constraints().unwrap().expect("basicConstraints").value.ca);
    assert_ne!(issued.leaf.serial, authority.sign(&request, &web(), &[], DAY, home.now).unwrap().leaf.serial);
    let foreign = "spiffe://evil.example/ns/shop/sa/web".parse().unwrap();
    assert!(authority.sign(&request, &foreign, &[], DAY, home.now).is_err());
}

#[test]
fn a_certificate_with_dns_names_keeps_its_identity_and_is_for_servers_alone() {
    let (home, authority) = home();
    let names = ["web.shop.svc".to_owned(), "web".to_owned()];
    let issued = authority.sign(&request(), &web(), &names, DAY, home.now).unwrap();
    assert_eq!(Leaf::parse_serving(&issued.chain[0]).unwrap(), (issued.leaf.clone(), names.to_vec()));
    assert_eq!(issued.leaf.id, web());
    assert!(Leaf::parse(&issued.chain[0]).is_err());
    let parsed = read(&issued.chain[0]).unwrap();
    let usage = parsed.extended_key_usage().unwrap().unwrap();
    assert!(usage.value.server_auth && !usage.value.client_auth);
}

#[test]
fn nothing_outlives_its_issuer_and_the_issuer_is_renewed_in_time() {
    let (home, authority) = home();
    assert!(!authority.issuing_is_due(home.now + ISSUING_LIFETIME / 4));
    assert!(authority.issuing_is_due(home.now + ISSUING_LIFETIME / 2));
    let late = authority.issuing.not_after - Duration::from_secs(60);
    let issued = authority.sign(&request(), &web(), &[], DAY, late).unwrap();
    assert_eq!(issued.leaf.not_after, authority.issuing.not_after);
    assert!(authority.sign(&request(), &web(), &[], DAY, authority.issuing.not_after).is_err());

    let renewed = authority.renew_issuing(&home.directory, late).unwrap();
    assert_eq!(renewed.root(), authority.root());
    assert!(renewed.issuing.not_after > authority.issuing.not_after);
    let after = authority.issuing.not_after + DAY;
    assert!(
        Authority::load(&home.directory, after).unwrap().sign(&request(), &web(), &[], DAY, after).is_ok()
    );
}

#[test]
fn an_expired_issuer_is_renewed_on_start() {
    let (home, authority) = home();
    let later = authority.issuing.not_after + DAY;
    assert!(Authority::load(&home.directory, later).unwrap().issuing.not_after > later);
}

#[test]
fn an_operator_adds_roots_but_cannot_lose_ours() {
    let ((home, authority), (other, _)) = (self::home(), self::home());
    let both =
        [ROOTS_FILE, ROOTS_FILE].iter().zip([&home, &other]).fold(Vec::new(), |mut all, (name, at)| {
            all.extend(at.directory.read(name).unwrap().unwrap());
            all
        });
    home.directory.write(ROOTS_FILE, &both).unwrap();
    assert_eq!(Authority::load(&home.directory, home.now).unwrap().roots().len(), 2);
    home.directory.write(ROOTS_FILE, &other.directory.read(ROOTS_FILE).unwrap().unwrap()).unwrap();
    let error = format!("{:#}", Authority::load(&home.directory, home.now).err().unwrap());
    assert!(error.contains("lacks the root"), "{error}");
    assert_eq!(authority.roots().len(), 1);
}
