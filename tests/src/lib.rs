//! What the tests of the whole mesh share: pods made of network namespaces, processes, the programs under test.
