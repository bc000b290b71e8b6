//! Room `config`: to be built.
