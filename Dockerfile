# The image of kproxy: Debian's Python and iptables, the pinned Python packages, and kproxy. No shell, no package tools, no compiler,
# no programs with setuid.
#
#   make image                                  # or: docker build --build-arg VERSION=0.1.0 -t kproxy:0.1.0 .
#
# What a container of it may and needs:
#   user 0, all capabilities dropped but NET_ADMIN  nf_tables, conntrack and iptables-nft, in the network namespace that it is in
#   and NET_RAW                                  where the node has the legacy variant of iptables, which takes a raw socket
#   root file system read-only                   with /run/xtables.lock of the node for the legacy variant, and a /tmp in memory where
#                                                a kubeconfig has certificates within: they are written to temporary files
#   privileged, once, for --init-only            the kernel's settings are under /proc/sys and /sys, which others have read-only
# Another user than 0 does not get far (tried): Kubernetes cannot give ambient capabilities, and those of a file reach Python but not
# the iptables programs that it starts, take allowPrivilegeEscalation: true, and leave root's lock file out of reach.

# Bookworm, because python-iptables works with its libxtables (1.8.9) and not with that of trixie (1.8.11).
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
# One installation for building and for picking from. The build tools are Debian's too: pip fetches nothing that has no hash.
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        ca-certificates iptables libpython3-stdlib media-types netbase python3-minimal \
        gcc libc6-dev python3-dev python3-hatchling python3-pip python3-setuptools python3-wheel >/dev/null

# The files of these packages, without documents, and the libraries' index. status.d is where scanners for vulnerable packages look
# in an image without dpkg.
RUN set -eu; \
    mkdir -p /system/usr/bin /system/usr/lib /system/usr/lib64 /system/usr/sbin /system/var/lib/dpkg/status.d /system/tmp; \
    ln -s usr/bin usr/lib usr/lib64 usr/sbin /system/; \
    for package in \
        base-files netbase media-types libc6 libc-bin libgcc-s1 zlib1g \
        python3-minimal python3.11-minimal libpython3.11-minimal libpython3.11-stdlib \
        libbz2-1.0 libcrypt1 libexpat1 libffi8 liblzma5 libsqlite3-0 libssl3 libuuid1 \
        iptables libip4tc2 libip6tc2 libmnl0 libnetfilter-conntrack3 libnfnetlink0 libnftnl11 libxtables12; \
    do \
        dpkg-query --status $package >/system/var/lib/dpkg/status.d/$package; \
        dpkg-query --listfiles $package \
            | grep -E '^/(bin|etc|lib|lib64|sbin|usr|var)/|^/(proc|sys|dev|run|tmp|root|home)$' \
            | grep -Ev '^/usr/lib/[^/]*/gconv/|^/usr/share/(bug|doc-base|lintian|locale|man|perl5|python3)/|^/usr/share/doc/.*/[^c]' \
            | sed 's,^/,,' \
            | tar -c -C / --no-recursion --ignore-failed-read --warning=no-failed-read -T - \
            | tar -x -C /system --keep-directory-symlink; \
    done; \
    cp /etc/passwd /etc/group /etc/nsswitch.conf /system/etc/; \
    mkdir -p /system/etc/ssl/certs; \
    cp /etc/ssl/certs/ca-certificates.crt /system/etc/ssl/certs/; \
    dpkg-query --status ca-certificates >/system/var/lib/dpkg/status.d/ca-certificates; \
    ldconfig -r /system; \
    python3 -m compileall -q -j 0 -s /system --invalidation-mode unchecked-hash /system/usr/lib/python3.11

# Of the kubernetes package, 125 of 126 MB are models and calls of every API, and all of it once more for asyncio. They are loaded
# when asked for by name, and kproxy never does: it takes configuration, credentials and the connection pool.
COPY requirements.lock .
RUN set -eu; \
    pip install --quiet --root /packages --root-user-action ignore --break-system-packages --ignore-installed --no-compile \
        --no-warn-script-location --no-build-isolation --require-hashes -r requirements.lock; \
    rm -r /packages/usr/local/bin; \
    cd /packages/usr/local/lib/python3.11/dist-packages; \
    find kubernetes/client/api kubernetes/client/models -type f ! -name __init__.py -delete; \
    rm -r kubernetes/aio aiohappyeyeballs* aiohttp* aiosignal* attr attrs* frozenlist* multidict* propcache* yarl*; \
    python3 -m compileall -q -j 0 -s /packages --invalidation-mode unchecked-hash .

# kubeadm's DaemonSet names /usr/local/bin/kube-proxy as its command: there, too, only the image changes.
WORKDIR /source
COPY . .
RUN set -eu; \
    pip install --quiet --root /kproxy --root-user-action ignore --break-system-packages --no-compile \
        --no-warn-script-location --no-build-isolation --no-deps .; \
    python3 -m compileall -q -j 0 -s /kproxy --invalidation-mode unchecked-hash /kproxy/usr/local/lib/python3.11/dist-packages; \
    ln -s kproxy /kproxy/usr/local/bin/kube-proxy; \
    mkdir -p /kproxy/usr/share/doc/kproxy; \
    cp LICENSE /kproxy/usr/share/doc/kproxy/copyright

FROM scratch
# One layer each, the one that changes most last.
COPY --from=build /system /
COPY --from=build /packages /
COPY --from=build /kproxy /
ENV PATH=/usr/local/bin:/usr/sbin:/usr/bin \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
ENTRYPOINT ["/usr/local/bin/kproxy"]
ARG VERSION=dev
ARG SOURCE=
LABEL org.opencontainers.image.title="kproxy" \
      org.opencontainers.image.description="A Kubernetes service proxy: takes kube-proxy's place on Linux nodes" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.version="${VERSION}"
