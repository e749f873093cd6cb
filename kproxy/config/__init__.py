"""kproxy's configuration: kube-proxy's `KubeProxyConfiguration`, and settings of its own (reference: section 8)."""
