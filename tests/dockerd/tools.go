//go:build tools

// Package tools pins what tests/support/dockerd_build.py builds; nobody compiles it.
package tools

import (
	_ "github.com/moby/moby/v2/cmd/dockerd"
	_ "github.com/opencontainers/runc"
)
