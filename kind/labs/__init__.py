"""Labs on the live cluster that the current kubeconfig reaches; needs kubectl and nothing else beside Python."""
