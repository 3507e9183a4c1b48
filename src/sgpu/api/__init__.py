"""The kubelet's APIs. Everything else in this package is generated from `proto/` (`tox -e generate`)."""
