//! The certificate authority of Weft: proves callers, signs their keys, keeps the roots.
