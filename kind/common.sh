# What the scripts beside this file share. They set `here`, the directory they are in, and source it.
# shellcheck shell=sh

# shellcheck disable=SC2154 # set by whoever sources this
root=${here%/*}
kube_system="kubectl -n kube-system"
selector=app.kubernetes.io/name=kproxy
missing=""
work=""

say() {
    printf '%s\n' "$*"
}

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# A directory of our own until the script ends.
make_work_directory() {
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

# need TOOL WHAT-FOR: notes a tool that is missing. Works without any tool.
need() {
    command -v "$1" >/dev/null 2>&1 || missing="$missing
  $1: $2"
}

# Ends the script if a tool is missing.
all_there() {
    [ -z "$missing" ] || die "missing on this machine:$missing"
}

need_kubectl() {
    need kubectl "speaks to the cluster; https://kubernetes.io/docs/tasks/tools/"
}

need_python() {
    need python3 "compares what the nodes' kernels hold with what they should"
}

need_kind() {
    need kind "makes clusters in containers; https://kind.sigs.k8s.io/docs/user/quick-start/#installation"
}

# Notes as missing what runs containers, unless docker or podman is there. Sets `engine`.
need_engine() {
    engine=${KIND_EXPERIMENTAL_PROVIDER:-}
    if [ -n "$engine" ]; then
        need "$engine" "named by KIND_EXPERIMENTAL_PROVIDER, runs the nodes"
    elif command -v docker >/dev/null 2>&1; then
        engine=docker
    elif command -v podman >/dev/null 2>&1; then
        engine=podman
    else
        missing="$missing
  docker or podman: runs the nodes; https://docs.docker.com/engine/install/ or https://podman.io"
    fi
}

# Ends the script if what runs containers does not answer. podman is tried where docker has no daemon, or is podman's own.
check_engine() {
    if [ "$engine" = docker ]; then
        case $(docker --version 2>/dev/null) in Docker*) ;; *) engine=podman ;; esac
    fi
    if [ "$engine" = docker ] && ! docker info >/dev/null 2>&1 && podman info >/dev/null 2>&1; then
        engine=podman
    fi
    "$engine" info >/dev/null 2>&1 ||
        die "$engine is there but does not answer. Is its daemon running, and may you use it? \`$engine info\` says more"
    [ "$engine" = docker ] || export KIND_EXPERIMENTAL_PROVIDER="$engine"
}

on_this_machine() {
    "$engine" image inspect "$1" >/dev/null 2>&1
}

# kind cannot bring an image to nodes under a name with a digest (its issues 2394 and 4028): one that is here gets a tag to
# go by, in `image`.
name_by_tag() {
    case $image in *@*) ;; *) return ;; esac
    on_this_machine "$image" || return 0
    digest=${image#*@}
    repository=${image%@*}
    case ${repository##*/} in *:*) repository=${repository%:*} ;; esac
    tagged=$repository:${digest%%:*}-${digest#*:}
    "$engine" tag "$image" "$tagged"
    say "$image goes to the nodes as $tagged"
    image=$tagged
}

check_mode() {
    case $1 in
    nftables | iptables | ipvs) ;;
    *) die "--mode $1: must be nftables, iptables or ipvs" ;;
    esac
}

check_cluster() {
    kubectl get nodes >"$work/nodes" 2>&1 ||
        die "kubectl cannot reach a cluster with the current kubeconfig: $(tail -n 1 "$work/nodes")"
}

# The name of the kind cluster that kubectl reaches; empty for any other.
kind_cluster() {
    provider_id | sed -n 's|^kind://[^/]*/\([^/]*\)/.*|\1|p'
}

# What runs its nodes: docker or podman.
kind_provider() {
    provider_id | sed -n 's|^kind://\([^/]*\)/.*|\1|p'
}

provider_id() {
    kubectl get nodes -o 'jsonpath={.items[0].spec.providerID}'
}

# deploy OVERLAY IMAGE: applies the overlay with the image, and with this cluster's addresses where it asks for them.
deploy() {
    [ -d "$work/deploy" ] || cp -R "$root/deploy" "$work/deploy"
    fill_in "$work/deploy/base/daemonset.yaml" "image: kproxy:dev" "s|image: kproxy:dev\$|image: $2|"
    config=$work/deploy/overlays/$1/config.conf
    if [ -f "$config" ]; then
        server=$(api_server)
        [ -n "$server" ] || die "cannot find the API server's address: neither ConfigMap kube-public/cluster-info nor kube-system/kube-proxy has one"
        fill_in "$work/deploy/base/kubeconfig.conf" "server:" "s|server: .*|server: $server|"
        pods=$($kube_system get configmap kubeadm-config -o 'jsonpath={.data.ClusterConfiguration}' 2>/dev/null |
            sed -n 's|^ *podSubnet: *||p' | tr -d '"')
        [ -z "$pods" ] || fill_in "$config" "# clusterCIDR:" "s|^# clusterCIDR:.*|clusterCIDR: $pods|"
        [ -z "$(kind_cluster)" ] || leave_conntrack_alone "$config"
    fi
    before=$($kube_system get daemonset kproxy -o name 2>/dev/null) || before=""
    kubectl apply -k "$work/deploy/overlays/$1"
    # A change of the configuration alone would not be noticed.
    [ -z "$before" ] || $kube_system rollout restart daemonset/kproxy
}

# The pods of nftables mode will see what kube-proxy has left in legacy iptables, too.
see_iptables() {
    cp -R "$root/deploy" "$work/deploy"
    grep -q '^components:' "$work/deploy/overlays/nftables/kustomization.yaml" ||
        printf 'components:\n- ../../components/xtables\n' >>"$work/deploy/overlays/nftables/kustomization.yaml"
}

# fill_in FILE TEXT SED-COMMAND: the text must be there, or the manifests have changed and this script has not.
fill_in() {
    grep -q -- "$2" "$1" || die "$1 has no \"$2\" to fill in"
    sed "$3" "$1" >"$work/filled"
    cat "$work/filled" >"$1"
}

# The nodes of kind are containers: the limits of connection tracking are this machine's, and not to be written there.
leave_conntrack_alone() {
    ! grep -q '^conntrack:' "$1" || die "$1 already has conntrack settings"
    cat >>"$1" <<END
conntrack:
  maxPerCore: 0
  tcpEstablishedTimeout: 0s
  tcpCloseWaitTimeout: 0s
END
}

# An address of the API server that works without Services: where nodes join, or where kube-proxy finds it.
api_server() {
    {
        kubectl -n kube-public get configmap cluster-info -o 'jsonpath={.data.kubeconfig}{"\n"}' 2>/dev/null
        $kube_system get configmap kube-proxy -o 'jsonpath={.data.kubeconfig\.conf}{"\n"}' 2>/dev/null
    } | sed -n 's|^ *server: *||p' | head -n 1
}

# wait_until_programmed SECONDS CONDITION: waits until it holds for the dry run of every kproxy pod: labs/programmed.py.
wait_until_programmed() {
    PYTHONPATH=$here python3 -m labs.programmed "$@"
}

# check_rollout SECONDS: waits until the kproxy that was rolled out is ready everywhere, and the kernels hold what they should.
check_rollout() {
    $kube_system rollout status daemonset/kproxy --timeout="$1s" || {
        show_kproxy
        die "kproxy does not become ready"
    }
    found=$(wait_until_programmed 180 all) || {
        show_kproxy
        die "a node's kernel does not hold what it should"
    }
    say "$found"
    case $found in *" to remove, "*)
        say "Virtual servers of ipvs mode stay while they have connections, a quarter of an hour at most."
        ;;
    esac
}

# What to look at when kproxy does not come up.
show_kproxy() {
    {
        $kube_system get pods -l "$selector" -o wide
        $kube_system describe pods -l "$selector" | sed -n '/^Events:/,$p' | tail -n 30
        $kube_system logs -l "$selector" --all-containers --prefix --tail=30
    } >&2 || true
}
