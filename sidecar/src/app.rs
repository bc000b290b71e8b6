//! Room `app`: to be built.
