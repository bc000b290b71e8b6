//! Room `balance`: to be built.
