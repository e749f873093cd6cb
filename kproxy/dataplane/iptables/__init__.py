"""iptables mode: kube-proxy's chains, name for name and rule for rule, in the legacy and the nft variant."""
