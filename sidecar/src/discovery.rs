//! Room `discovery`: to be built.
