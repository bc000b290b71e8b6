//! Room `redirect`: to be built.
