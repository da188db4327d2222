"""flannel's own faces: flanneld, flanneld-start and mk-docker-opts.sh, reached through `flanctl.entry` by name."""
