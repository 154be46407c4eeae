"""TRL's own tests of its trainers, run on masked ones: `make test-peer TRL=path`."""
