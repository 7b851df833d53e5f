//! Every raw kernel interface, each a small safe type. The only place with `unsafe` outside the shim.
